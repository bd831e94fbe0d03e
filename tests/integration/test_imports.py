"""What an import must not pull in."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("megatron_llep", ["torch", "megatron", "numba"]),
        ("megatron_llep.planner", ["torch", "megatron", "numba"]),
        ("megatron_llep.config", ["torch", "megatron", "numba"]),
        ("megatron_llep.offline.compare.command", ["torch", "megatron", "matplotlib", "wandb"]),
        ("megatron_llep.device", ["megatron", "transformer_engine"]),
    ],
)
def test_light_modules_stay_light(module, forbidden):
    code = f"import sys, {module}; print([m for m in {forbidden} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_public_names_resolve():
    import megatron_llep

    for name in megatron_llep.__all__:
        assert getattr(megatron_llep, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = megatron_llep.nonsense
