"""Records of a run: metrics, goodput, summary."""
