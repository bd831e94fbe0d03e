"""The real MoE layer, forward and backward, EP = 2 on two pinned cores: plain Megatron and LLEP.

python benchmarks/bench_layer.py          (make bench)

First calibrates the cost model for this layer on this machine, unless --cost-model is given, so
that planner auto can choose and predictions stand next to what is measured. Then, for every
workload, all variants run in alternation. Writes JSON and a picture. CPU and gloo only.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

# As a script this file has its own folder on the path alone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.layer_ranks import BALANCED, PLAIN, Job, measure_ranks
from benchmarks.layer_report import draw, format_rows, make_rows
from megatron_llep.config import LLEPConfig
from megatron_llep.offline.calibration.build import build_cost_model
from megatron_llep.offline.calibration.measure import CPU_SIZES, choose_sizes, measure
from megatron_llep.offline.calibration.planning import time_planning
from megatron_llep.offline.machine import describe_machine
from megatron_llep.offline.report.results import write_results
from megatron_llep.offline.workloads import get_workload
from megatron_llep.planner.cost.model import LayerCost, LayerShape
from megatron_llep.planner.cost.presets import get_cost_model

SIZES = {
    "num_ranks": 2,
    "hidden": 512,
    "ffn_hidden": 1024,
    "num_experts": 32,
    "tokens_per_rank": 6144,
}
QUICK_SIZES = SIZES | {"hidden": 64, "ffn_hidden": 64, "num_experts": 8, "tokens_per_rank": 256}
WORKLOADS = (BALANCED, "lognormal-1", "hot-50-4", "hot-80-4", "hot-80-1", "hot-95-1")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = _parse(argv)
    if torch.cuda.is_available():
        raise ValueError("bench_layer pins ranks to cores: hide the GPUs, CUDA_VISIBLE_DEVICES=''")
    start = time.perf_counter()
    sizes = QUICK_SIZES if args.quick else SIZES
    workloads = [get_workload(name).name for name in dict.fromkeys((BALANCED, *args.workloads))]
    machine = describe_machine()
    print(f"{machine}\n{sizes}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = args.cost_model or calibrate_layer(sizes, machine, args.quick, Path(folder))
        model = get_cost_model(str(path))
        variants: dict[str, LLEPConfig | None] = {PLAIN: None}
        for planner in args.planners:
            cost_model = str(path) if planner == "auto" else None
            variants[planner] = LLEPConfig(planner=planner, cost_model=cost_model)
        job = Job(
            sizes=sizes,
            variants=variants,
            workloads=tuple(workloads),
            rounds=args.rounds,
            seed=args.seed,
        )
        found = measure_ranks(job)
    shape = LayerShape(
        hidden=sizes["hidden"],
        ffn_hidden=sizes["ffn_hidden"],
        num_experts=sizes["num_experts"],
        top_k=1,
        bytes_per_element=4,
    )
    rows = make_rows(job, found, LayerCost(model=model, shape=shape))
    print(format_rows(rows))
    results = {
        "sizes": sizes,
        "rounds": args.rounds,
        "seed": args.seed,
        "cost_model": dataclasses.asdict(model),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write_results(args.output / "layer.json", results, machine=machine)
    draw(rows, f"{machine}; {_describe(sizes)}", args.output / "layer.png")
    print(f"{args.output / 'layer.json'}, layer.png   ({time.perf_counter() - start:.0f} s)")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--planners", nargs="+", default=["tolerant", "exact", "lla", "auto"], metavar="PLANNER"
    )
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), metavar="WORKLOAD")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost-model", help="a file that `calibrate` wrote")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="a tiny layer: a trial run")
    return parser.parse_args(argv)


def calibrate_layer(sizes: dict[str, int], machine: str, quick: bool, folder: Path) -> Path:
    """Fit a cost model to this layer's experts on this machine."""
    measured = measure(
        choose_sizes(CPU_SIZES, expert=(sizes["hidden"], sizes["ffn_hidden"]), quick=quick),
        report=lambda what: print(f"calibrating: {what} ...", flush=True),
    )
    model, checks = build_cost_model(
        machine=machine,
        experts=measured.experts,
        inside=measured.inside,
        copy_bytes_per_second=measured.copy_bytes_per_second,
        overlap=measured.overlap,
        planning_seconds=time_planning(
            num_ranks=sizes["num_ranks"], num_experts=sizes["num_experts"]
        ),
    )
    print("\n".join(f"prediction error, {check}" for check in checks), flush=True)
    path = folder / "cost_model.json"
    model.save(path)
    return path


def _describe(sizes: dict[str, int]) -> str:
    return (
        f"hidden {sizes['hidden']}, expert {sizes['ffn_hidden']}, {sizes['num_experts']} experts, "
        f"{sizes['tokens_per_rank']} tokens a rank, top-1, fp32, gloo"
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
