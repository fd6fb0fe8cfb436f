"""Where examples come from: TFDS, CIFAR-10 archives, digits, procedural shapes."""
