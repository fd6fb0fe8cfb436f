"""Conversion of trained weights from and to other layouts."""
