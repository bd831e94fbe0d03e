"""What LLEP says of a training configuration, before anything trains."""
