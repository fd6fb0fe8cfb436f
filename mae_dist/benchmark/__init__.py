"""Measures steps, features and input here, by turns with others'."""
