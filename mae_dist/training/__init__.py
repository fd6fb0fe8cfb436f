"""One run: everything wired together, and the loop."""
