"""What the tests share: ranks as forked processes, and a tiny Megatron model."""
