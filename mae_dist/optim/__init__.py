"""The optimizer and the state that it updates."""
