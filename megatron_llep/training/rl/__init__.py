"""Group relative policy optimisation (GRPO, arXiv 2402.03300) in Megatron's own training loop."""
