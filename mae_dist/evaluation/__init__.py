"""Evaluation of trained models: losses, accuracies, features, pictures."""
