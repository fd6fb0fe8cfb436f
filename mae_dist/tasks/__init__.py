"""What is trained: pretraining, probing and fine-tuning, each as one `Task` value."""
