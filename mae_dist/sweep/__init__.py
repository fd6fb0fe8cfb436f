"""Many runs: every combination of some fields' values, under several seeds."""
