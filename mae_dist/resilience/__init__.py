"""What a run does when its machine, its peers or its device fail."""
