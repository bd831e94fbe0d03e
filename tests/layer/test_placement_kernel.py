"""The placement kernels: under Triton's interpreter, compiled for GPUs, and on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("interpreted_placement.py")
# What each argument that is no constant points to or is.
TYPES = {
    "chosen": "*u8",
    "pair_index": "*i64",
    "listed_pair": "*i64",
    "token_index": "*i64",
    "rows": "*bf16",
    "output": "*bf16",
    **dict.fromkeys(("per_tile", "per_token", "pair_ends", "token_ends", "table"), "*i32"),
    **dict.fromkeys(("by_token", "listed_by_token", "rows_by_token"), "*i32"),
}


def test_under_the_interpreter():
    """All tests of `interpreted_placement.py` pass."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile(capability, tmp_path, monkeypatch):
    """No GPU is needed to compile for one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_llep.placement import kernel

    tile = {"num_experts": 384, "TILE_T": kernel._TILE_TOKENS, "TILE_E": kernel._TILE_EXPERTS}
    constants = {
        kernel._count: tile,
        kernel._list: tile,
        kernel._place: {"num_experts": 384, "PAIRS": kernel._PAIRS_PER_PROGRAM},
        kernel._sum: {
            "DTYPE": triton.language.float32,
            "COLUMNS": kernel._COLUMNS_PER_PROGRAM,
        },
    }
    for function, known in constants.items():
        signature = {
            name: "constexpr" if name in known else TYPES.get(name, "i32")
            for name in function.arg_names
        }
        compiled = triton.compile(
            ASTSource(function, signature, known), target=GPUTarget("cuda", capability, 32)
        )
        assert compiled.asm["cubin"]


@pytest.mark.gpu
def test_on_the_gpu():
    from megatron_llep.placement.check import check_placement_kernel

    found = check_placement_kernel(torch.device("cuda"))
    print(found)
    assert found["equal"]
    assert found["worst_sum_error"] < 4e-3
    assert found["milliseconds"]["sum_rows"] > 0


@pytest.mark.gpu
def test_sums_are_the_same_every_time():
    from megatron_llep.placement import kernel
    from megatron_llep.placement.check import make_case

    routing_map, chunks = make_case(2000, 64, 6, 2, seed=0)
    listed = kernel.list_pairs(routing_map.cuda(), 12_000)
    placement = kernel.place_pairs(listed, chunks, 64)
    rows = torch.randn(12_000, 512, dtype=torch.bfloat16, device="cuda")
    first, *others = (
        kernel.sum_rows(rows, placement.rows_by_token, placement.token_ends) for _ in range(5)
    )
    assert all(torch.equal(first, other) for other in others)
