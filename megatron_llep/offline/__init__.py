"""What happens beside training: starting runs, reading what they logged, comparing them."""
