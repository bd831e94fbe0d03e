"""Check LLEP on a machine with one or more GPUs: one command, several sections.

    python tools/gpu_check.py
    python tools/gpu_check.py --sections critical-path --models deepseek-v3 --workloads hot-95-1
    python tools/gpu_check.py --device cpu --quick     (a trial run, where no GPU is)

correctness    real Megatron with LLEP against plain Megatron: losses and every gradient
placement      the Triton kernels that order tokens, against torch's operators
kernels        the tests that need a GPU: pytest -m gpu
critical-path  for the paper's models and workloads, the worst rank's expert work under plain EP and
               each planner, ranks run one after another on one GPU
memory         peak memory of that work, against balanced routing

Placement and the last two need torch, numpy and this repository alone. Says what is missing, runs
what can be run, and writes JSON. Exit code: 0 if no section failed, 1 if one did, 2 for unusable
options.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Where nothing can be installed, the package is the one beside this file.
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from gpu_checks.correctness import check_correctness  # noqa: E402
from gpu_checks.demands import DEFAULT_PLANNER, HOTTEST  # noqa: E402
from gpu_checks.environment import list_gpus, list_missing, read_versions  # noqa: E402
from gpu_checks.kernels import check_kernels  # noqa: E402
from gpu_checks.paths import (  # noqa: E402
    KINDS,
    PathJob,
    judge_memory,
    judge_time,
    list_kinds,
    measure_paths,
    shrink,
)
from gpu_checks.placement import check_placement  # noqa: E402
from gpu_checks.section import Section, format_summary, run_section  # noqa: E402

from megatron_llep.offline.machine import describe_machine  # noqa: E402
from megatron_llep.offline.simulator.models import MODELS, ModelShape  # noqa: E402
from megatron_llep.offline.workloads import PAPER_GRID, get_workload  # noqa: E402
from megatron_llep.planner.cost.presets import get_cost_model  # noqa: E402

SECTIONS = ("correctness", "placement", "kernels", "critical-path", "memory")
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
    sections = run_sections(args, job)
    print(f"\n{format_summary(sections)}\n({time.perf_counter() - start:.0f} s in all)")
    if args.output is not None:
        results = {
            "machine": describe_machine(),
            "gpus": list_gpus(),
            "versions": versions,
            "missing": sorted(missing),
            "command": list(sys.argv[1:] if argv is None else argv),
            "method": (
                "Critical path: each rank's expert work alone on one device, ranks one after "
                f"another, CUDA events, median of {job.rounds} rounds after a warm-up, methods in "
                "alternation; the worst rank counts. "
                f"Transfers are predictions of the cost model: {job.cost.machine}."
            ),
            "sections": [asdict(section) for section in sections],
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")
        print(args.output)
    return int(any(section.state == "FAILED" for section in sections))


def build_parser() -> argparse.ArgumentParser:
    """Command-line interface of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--ep", nargs="+", type=int, default=[2, 4], help="correctness: expert-parallel sizes"
    )
    parser.add_argument(
        "--models", nargs="+", choices=tuple(MODELS), default=list(MODELS), metavar="MODEL"
    )
    parser.add_argument(
        "--tokens", type=int, help="a rank; default: as the paper, 32768 and 16384 by model"
    )
    parser.add_argument(
        "--workloads",
        nargs="+",
        default=list(PAPER_GRID),
        metavar="WORKLOAD",
        help="besides balanced; default: the paper's grid",
    )
    parser.add_argument(
        "--planners",
        nargs="+",
        choices=("tolerant", "exact", "lla"),
        metavar="PLANNER",
        default=["tolerant", "exact", "lla"],
    )
    parser.add_argument(
        "--experts",
        nargs="+",
        choices=tuple(KINDS),
        help="grouped GEMMs. grouped_mm: torch's, te: Transformer Engine's, natives and lent "
        "experts apart, as LLEP runs them. one_slab: torch's, together. Default: grouped_mm, and "
        "te where it is installed",
    )
    parser.add_argument(
        "--cost-model",
        help="of the links: h100, h200 or a file that `calibrate` wrote; "
        "default: by the GPU's name",
    )
    parser.add_argument("--rounds", type=int, default=5, help="critical path: timed runs of each")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, one comparison: a trial run"
    )
    parser.add_argument(
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
        workloads=tuple(get_workload(name).name for name in args.workloads),
        planners=tuple(args.planners),
        cost=get_cost_model(args.cost_model or preset),
        device=torch.device(args.device),
        rounds=args.rounds,
        judged=(
            not trial
            and all(model == MODELS[model.name] for model in models)
            and HOTTEST in args.workloads
            and DEFAULT_PLANNER in args.planners
        ),
    )


def run_sections(args: argparse.Namespace, job: PathJob) -> list[Section]:
    """Those that were asked for, in their order."""
    wanted = set(args.sections)
    sections = []
    if "correctness" in wanted:
        ep_sizes = tuple(sorted(set(args.ep)))
        sections.append(
            run_section(
                "correctness",
                lambda: check_correctness(ep_sizes=ep_sizes, device=args.device, quick=args.quick),
            )
        )
    if "placement" in wanted:
        sections.append(run_section("placement", lambda: check_placement(device=args.device)))
    if "kernels" in wanted:
        sections.append(
            run_section(
                "kernels", lambda: check_kernels(ROOT, device=args.device, limit_seconds=600)
            )
        )
    if wanted & {"critical-path", "memory"}:
        sections += run_path_sections(job, wanted)
    return sections


def run_path_sections(job: PathJob, wanted: set[str]) -> list[Section]:
    """Critical path and memory come from the same runs."""
    measured = []

    def measure_and_judge() -> Section:
        measured.append(measure_paths(job))
        return judge_time(job, *measured[0])

    def judge_measured() -> Section:
        if not measured:
            return Section(name="memory", state="skipped", reason="the critical path failed")
        return judge_memory(job, measured[0][0])

    sections = [run_section("critical path", measure_and_judge)]
    if "memory" in wanted:
        sections.append(run_section("memory", judge_measured))
    return sections


if __name__ == "__main__":
    sys.exit(main())
