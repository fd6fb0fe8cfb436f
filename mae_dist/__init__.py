"""Masked autoencoders in JAX, from one CPU to a TPU pod: sharded, resumable, measured."""
