"""Expert compute over native and foreign experts: one file for each of Megatron's modules."""
