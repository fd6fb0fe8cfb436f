"""What a mesh of accelerators that are not here would hold, exchange and take."""
