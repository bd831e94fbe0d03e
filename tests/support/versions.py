"""What an older Megatron lacks that tests use."""

import pytest

from megatron_llep.compat import MEGATRON

ABSENT_SETTINGS = (
    {
        "expert_gtp_weight_remat_size",
        "--expert-tensor-parallel-num-weight-shards",
        "--tensor-parallel-num-weight-shards",
        "--mtp-detach-heads",
    }
    if MEGATRON < (0, 19)
    else set()
)
"""Fields and flags that LLEP's table of settings names."""


def needs_megatron(since: tuple[int, int], what: str) -> pytest.MarkDecorator:
    """Skip a test where Megatron is older and cannot do what the test is about."""
    version = ".".join(map(str, since))
    return pytest.mark.skipif(since > MEGATRON, reason=f"{what}: from Megatron {version} on")
