"""From a configuration of `configs/` to a training command that runs to its end."""
