"""CPU optimisations: cores as devices, microbatches, folding, kernels, oneDNN. GPUs and TPUs use none of them."""
