"""What a script on top of `megatron.training.pretrain` needs: flags, data, one training step."""
