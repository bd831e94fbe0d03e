"""Settings of Megatron that only some of its versions have."""

NEW_REFUSALS: dict[tuple[int, int], tuple[tuple[str, str, str], ...]] = {
    (0, 20): (
        (
            "moe_use_grouped_tensor",
            "--moe-use-grouped-tensor",
            "its kernels take the weights of native experts alone; leave the flag out, and in a "
            "model built in Python use_transformer_engine_op_fuser, which sets it",
        ),
        (
            "batch_invariant_mode",
            "--batch-invariant-mode",
            "LLEP adds up a token's rows in an order of its own; leave the flag out",
        ),
    ),
}
"""By the version that brings them: field, flag, reason and way out of what LLEP refuses since."""


def refused_by(version: tuple[int, int]) -> list[tuple[str, str, str]]:
    """What LLEP refuses with this version of Megatron, besides what it refuses with every one."""
    return [each for since, new in NEW_REFUSALS.items() if since <= version for each in new]
