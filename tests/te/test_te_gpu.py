"""Foreign experts in Transformer Engine's grouped GEMMs, on a GPU with its own kernels.

python -m pytest -m gpu tests/te
"""

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformer_engine.pytorch")

import transformer_engine.pytorch as te
from te_hosting import Modules, make_expert_config, run_both

from support.layout import Layout, use_layout

pytestmark = [pytest.mark.te, pytest.mark.gpu]

# Multiples of 128, the blocks of FP8 scaling.
SIZES = {"hidden_size": 256, "moe_ffn_hidden_size": 384, "ffn_hidden_size": 384}
BF16 = SIZES | {"params_dtype": torch.bfloat16, "bf16": True}
FUSED = {"gradient_accumulation_fusion": True}
ACT = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}


@pytest.fixture
def one_rank(tmp_path):
    """Megatron's groups in this process, which has the GPU."""
    torch.cuda.set_device(0)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        with use_layout(Layout()):
            yield
    finally:
        dist.destroy_process_group()


def assert_hosted_are_as_in_one_module(changes: dict) -> None:
    config = make_expert_config(**changes)
    modules = Modules.make(config, "cuda")
    for _ in range(2):  # the second time quantisers and caches are there
        pairs = run_both(modules, config)
    for ours, theirs in pairs:
        assert ours.abs().sum() > 0
        torch.testing.assert_close(ours, theirs)
    expected, hosted = modules.gradients()
    for ours, theirs in zip(hosted, expected, strict=True):
        torch.testing.assert_close(ours, theirs)  # NaN is not close to NaN
    assert sum(gradient.abs().sum() > 0 for gradient in hosted) >= len(hosted) * 4 // 5


@pytest.mark.parametrize(
    "changes",
    [
        SIZES,
        BF16,
        BF16 | FUSED,
        BF16 | {"add_bias_linear": True},
        BF16 | FUSED | {"add_bias_linear": True},
        BF16 | FUSED | ACT,
        BF16 | {"gated_linear_unit": False},
    ],
    ids=lambda changes: "-".join(changes.keys() - SIZES.keys()) or "fp32",
)
def test_hosted_experts(one_rank, changes):
    assert_hosted_are_as_in_one_module(changes)


def make_fp8(recipe: str) -> dict:
    available = {
        "tensorwise": te.is_fp8_available,
        "blockwise": te.is_fp8_block_scaling_available,
        "mxfp8": te.is_mxfp8_available,
    }[recipe]
    if not available():
        pytest.skip(f"this GPU has no FP8 scaling {recipe}")
    # Blockwise scaling is for e4m3 alone.
    return {"fp8": "e4m3", "fp8_recipe": recipe}


@pytest.mark.parametrize("fused", [{}, FUSED], ids=["unfused", "fused"])
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_hosted_experts_in_fp8(one_rank, recipe, fused):
    assert_hosted_are_as_in_one_module(BF16 | fused | make_fp8(recipe))


@pytest.mark.parametrize("fused", [{}, FUSED], ids=["unfused", "fused"])
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_hosted_quantised_parameters(one_rank, recipe, fused):
    """Of `--fp8-param-gather`: TE's quantisers made them, and foreign ones are lent bytes."""
    parameters = {"fp8_param": True, "use_cpu_initialization": False}
    assert_hosted_are_as_in_one_module(BF16 | fused | make_fp8(recipe) | parameters)
