"""Programs in PyTorch that `mae_dist.benchmark --against` takes turns with; they import neither JAX nor mae_dist."""
