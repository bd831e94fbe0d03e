"""Check LLEP on a machine with one or more GPUs: one command, several sections.

    python tools/gpu_check.py
    python tools/gpu_check.py --sections critical-path --models deepseek-v3 --workloads hot-95-1
    python tools/gpu_check.py --device cpu --quick     (a trial run, where no GPU is)

correctness    real Megatron with LLEP against plain Megatron: losses and every gradient
placement      the Triton kernels that order tokens, against torch's operators
kernels        the tests that need a GPU: pytest -m gpu
critical-path  for the paper's models and workloads, the slowest rank's layer, Megatron's and
               LLEP's, ranks run one after another on one GPU, over a stand-in for the process group
memory         peak memory of these layers, against balanced routing

Placement needs torch, numpy and this repository alone, the others megatron-core. Says what is
missing, runs what can be run, and writes JSON. Exit code: 0 if no section failed, 1 if one did, 2
for unusable options.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

# Where nothing can be installed, the package is the one beside this file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_checks.correctness import check_correctness
from gpu_checks.critical_path import (
    KINDS,
    METHOD,
    PathJob,
    judge_memory,
    judge_time,
    list_kinds,
    measure_paths,
    shrink,
)
from gpu_checks.demands import BALANCED, DEFAULT_PLANNER, HOTTEST, Row
from gpu_checks.environment import list_missing
from gpu_checks.kernels import check_kernels, check_placement
from gpu_checks.section import Section, SkippedError, format_summary, run_section

from megatron_llep.offline.machine import describe_machine, list_gpus, read_versions
from megatron_llep.offline.report.results import write_results
from megatron_llep.offline.simulator.models import MODELS, ModelShape
from megatron_llep.offline.workloads import PAPER_GRID, get_workload
from megatron_llep.planner.cost.presets import get_cost_model

SECTIONS = ("correctness", "placement", "kernels", "critical-path", "memory")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_check.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections, print, write."""
    parser = build_parser()
    args = parser.parse_args(argv)
    start = time.perf_counter()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the processes to be started, too
    elif not torch.cuda.is_available():
        parser.error("torch sees no GPU; for a trial run without one give --device cpu --quick")
    try:
        job = make_path_job(args)
    except ValueError as error:
        parser.error(str(error))
    versions, missing = read_versions(), list_missing()
    print(describe_machine())
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for name, loss in missing.items():
        print(f"missing: {name}: {loss}")
    works = list_sections(args, job)
    sections = [run_section(name.replace("-", " "), work) for name, work in works.items()]
    print(f"\n{format_summary(sections)}\n({time.perf_counter() - start:.0f} s in all)")
    if args.output is not None:
        results = {
            "gpus": list_gpus(),
            "versions": versions,
            "missing": sorted(missing),
            "command": list(sys.argv[1:] if argv is None else argv),
            "method": [*METHOD.splitlines(), f"Cost model: {job.cost.machine}."],
            "sections": [asdict(section) for section in sections],
        }
        write_results(args.output, results)
        print(args.output)
    return int(any(section.state == "FAILED" for section in sections))


def build_parser() -> argparse.ArgumentParser:
    """Command-line interface of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    planners = ["tolerant", "exact", "lla"]
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    add("--ep", nargs="+", type=int, default=[2, 4], help="correctness: expert-parallel sizes")
    add("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS), metavar="MODEL")
    add("--tokens", type=int, help="a rank; default: as the paper, 32768 and 16384 by model")
    add(
        "--workloads",
        nargs="+",
        default=list(PAPER_GRID),
        metavar="WORKLOAD",
        help="besides balanced; default: the paper's grid",
    )
    add("--planners", nargs="+", choices=planners, metavar="PLANNER", default=planners[:1])
    add(
        "--experts",
        nargs="+",
        choices=KINDS,
        help="grouped GEMMs: grouped_mm of torch, te of Transformer Engine. Default: grouped_mm, "
        "and te where it is installed",
    )
    add(
        "--cost-model",
        help="of the links: h100, h200 or a file that `calibrate` wrote; "
        "default: by the GPU's name",
    )
    add("--rounds", type=int, default=3, help="critical path: timed runs of each")
    add("--quick", action="store_true", help="tiny shapes, one comparison: a trial run")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"default: {RESULTS.relative_to(ROOT)}, in trial runs none",
    )
    return parser


def make_path_job(args: argparse.Namespace) -> PathJob:
    """What to measure on the critical path; also settles what depends on the kind of run.

    Raises:
        ValueError: a workload, cost model or size is unusable.
    """
    trial = args.quick or args.device == "cpu"
    if args.output is None and not trial:
        args.output = RESULTS
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: give 1 or more")
    if min(args.ep) < 2:
        raise ValueError(f"--ep {min(args.ep)}: lending takes 2 ranks or more")
    if args.tokens is not None and args.tokens < 1:
        raise ValueError(f"--tokens {args.tokens}: give 1 or more")
    models: list[ModelShape] = [MODELS[name] for name in args.models]
    if args.quick:
        models = [shrink(model) for model in models]
    if args.tokens is not None:
        models = [replace(model, tokens_per_rank=args.tokens) for model in models]
    preset = "h200" if any("H200" in str(gpu["name"]) for gpu in list_gpus()) else "h100"
    return PathJob(
        models=tuple(models),
        kinds=tuple(args.experts or list_kinds()),
        workloads=(BALANCED, *(get_workload(name).name for name in args.workloads)),
        planners=tuple(args.planners),
        cost=get_cost_model(args.cost_model or preset),
        rounds=args.rounds,
        judged=(
            not trial
            and all(model == MODELS[model.name] for model in models)
            and HOTTEST in args.workloads
            and DEFAULT_PLANNER in args.planners
        ),
    )


def list_sections(args: argparse.Namespace, job: PathJob) -> dict[str, Callable[[], Section]]:
    """Those that were asked for, in their order; critical path and memory share their runs."""
    rows: list[Row] = []

    def check_path() -> Section:
        found, refused = measure_paths(job)
        rows.extend(found)
        return judge_time(job, rows, refused)

    def check_memory() -> Section:
        if not rows:
            raise SkippedError("nothing was measured on the critical path")
        return judge_memory(job, rows)

    ep_sizes = sorted(set(args.ep))
    works = {
        "correctness": lambda: check_correctness(args.device, ep_sizes, quick=args.quick),
        "placement": lambda: check_placement(args.device),
        "kernels": lambda: check_kernels(args.device, ROOT),
        "critical-path": check_path,
        "memory": check_memory,
    }
    wanted = {*args.sections} | ({"critical-path"} if "memory" in args.sections else set())
    return {name: work for name, work in works.items() if name in wanted}


if __name__ == "__main__":
    sys.exit(main())
