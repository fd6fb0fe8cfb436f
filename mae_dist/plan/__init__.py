"""Memory, communication and time of a training on a mesh of accelerators that are not here."""
