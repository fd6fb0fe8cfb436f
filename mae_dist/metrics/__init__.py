"""What a run records: metrics, goodput, its summary."""
