"""What a model has learned: losses, accuracies, features, pictures."""
