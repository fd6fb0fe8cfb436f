"""Trained weights from elsewhere and for elsewhere: other layouts, conversion."""
