"""Grouped GEMMs against experts one after another: `--moe-llep-expert-gemm`, on one CPU core.

python benchmarks/expert_gemm.py    # prints a table and writes results/expert_gemm.json; a minute

One rank's experts (SwiGLU, no biases), forward and backward, as Megatron's `SequentialMLP` and as a
`GroupedMM` of the same weights, in alternation in one process. Each figure is the median over the
rounds; the ratio is the median of the rounds' ratios, with their quartiles. "in DDP's buffer" is
what the distributed optimizer makes of it: weights lie in reverse order and are copied together.

Letters: M experts, n rows of each on average, H hidden size, F size of an expert's middle.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_llep.device import use_cpu_if_no_gpu
from megatron_llep.offline.machine import describe_machine
from megatron_llep.offline.report.progress import start_progress
from megatron_llep.offline.report.results import write_results
from megatron_llep.offline.report.table import format_table
from megatron_llep.offline.timing import take_turns

RESULTS = Path(__file__).parent / "results" / "expert_gemm.json"
SHAPES = (
    (128, 4, 64, 32),
    (64, 8, 128, 64),
    (64, 32, 128, 64),
    (64, 32, 256, 128),
    (16, 128, 256, 512),
    (8, 512, 512, 1024),
)
"""M, n, H, F: from many small experts to few large ones."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VARIANTS = ("sequential", "grouped", "grouped, in DDP's buffer")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first so many alone")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    use_cpu_if_no_gpu()
    torch.set_num_threads(1)
    machine = describe_machine()
    print(f"{machine}; one core")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    start_megatron()
    rows = []
    cases = list(itertools.product(SHAPES[: args.shapes], DTYPES))
    advance = start_progress(len(cases), "measuring")
    for shape, dtype in cases:
        rows.append(measure(shape, dtype, args.rounds))
        advance()
    print(format_table(make_table(rows)))
    write_results(args.output, {"rounds": args.rounds, "rows": rows}, machine=machine)
    dist.destroy_process_group()
    return 0


def start_megatron() -> None:
    """Megatron's process groups, of one rank."""
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def measure(shape: tuple[int, int, int, int], dtype: str, rounds: int) -> dict[str, Any]:
    """Time all variants of one size in alternation."""
    M, n, H, F = shape
    # Skewed, as routing is: some experts have no row.
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(M, generator=generator).square()
    sizes = (share / share.sum() * M * n).long()
    sizes[0] += M * n - sizes.sum()
    hidden = torch.randn(M * n, H, generator=generator).to(DTYPES[dtype]).requires_grad_()
    probs = torch.rand(M * n, generator=generator)
    steps = {
        name: build_step(name, shape, DTYPES[dtype], hidden, sizes, probs) for name in VARIANTS
    }
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for name, counts in take_turns(VARIANTS, rounds, warm_up=2):
        start = time.perf_counter()
        steps[name]()
        if counts:
            seconds[name].append(time.perf_counter() - start)
    row: dict[str, Any] = {"M": M, "n": n, "H": H, "F": F, "dtype": dtype}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds["sequential"], times, strict=True)]
        row[name] = {
            "milliseconds": 1000 * statistics.median(times),
            "speed_up": statistics.median(ratios),
            "speed_up_quartiles": statistics.quantiles(ratios, n=4)[::2],
        }
    return row


def build_step(
    name: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    hidden: torch.Tensor,
    sizes: torch.Tensor,
    probs: torch.Tensor,
) -> Callable[[], None]:
    """Forward and backward of one variant."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_llep.experts.grouped_mm import GroupedMM

    M, _, H, F = shape
    config = TransformerConfig(
        num_layers=1,
        hidden_size=H,
        num_attention_heads=1,
        num_moe_experts=2 * M,
        expert_model_parallel_size=2,  # its other rank is not there
        moe_ffn_hidden_size=F,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        add_bias_linear=False,
        params_dtype=dtype,
    )
    experts = SequentialMLP(
        M,
        config,
        MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        ProcessGroupCollection.use_mpu_process_groups(),
    )
    parameters = list(experts.parameters())
    if name != "sequential":
        GroupedMM.convert(experts)
    if name == "grouped, in DDP's buffer":
        buffer = torch.cat([parameter.detach().ravel() for parameter in parameters[::-1]])
        pieces = buffer.split([parameter.numel() for parameter in parameters[::-1]])
        for parameter, piece in zip(parameters[::-1], pieces, strict=True):
            parameter.data = piece.view(parameter.shape)
    grad = torch.ones_like(hidden)

    def step() -> None:
        experts.zero_grad(set_to_none=True)
        hidden.grad = None
        output, _ = experts(hidden, sizes, probs)
        output.backward(grad)

    return step


def make_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Milliseconds of each variant and, with its quartiles, the speed-up over the first one."""
    table = [["M, n, H, F, dtype", *(f"{name}, ms" for name in VARIANTS)]]
    for row in rows:
        cells = [f"{row['M']}, {row['n']}, {row['H']}, {row['F']}, {row['dtype']}"]
        for name in VARIANTS:
            low, high = row[name]["speed_up_quartiles"]
            cell = f"{row[name]['milliseconds']:.2f}"
            if name != VARIANTS[0]:
                cell += f" ({row[name]['speed_up']:.2f}x, {low:.2f}-{high:.2f})"
            cells.append(cell)
        table.append(cells)
    return table


if __name__ == "__main__":
    raise SystemExit(main())
