"""The masked autoencoder and the classifiers on its encoder: plain JAX, without mesh or platform."""
