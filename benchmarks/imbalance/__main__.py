"""What methods against token imbalance cost and gain, under workloads W0 to W7, in one run.

python -m benchmarks.imbalance           # a table, a picture: benchmarks/results/imbalance.*

Megatron's own MoE layer, LLEP with each planner that lends, experts placed as EPLB does, and forced
balance. Every method is checked before it is timed: which token went where, with which weight, and
outputs and gradients against a reference without a dispatcher. Ranks are processes of this machine:
on its GPUs over NCCL, without any over gloo. After Megatron-LM's pull request 7488.
"""

import argparse
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.imbalance.data import LayerSizes
from benchmarks.imbalance.names import (
    AUTO,
    EPLB,
    FORCED,
    METHODS,
    MODES,
    PLAIN,
    PLANNERS,
    REPLICATED,
)
from benchmarks.imbalance.oracle import TOLERANCE
from benchmarks.imbalance.ranks import HISTORY, Found, Job, check_machine, run_job
from benchmarks.imbalance.report import describe_method, draw, format_page, format_table
from benchmarks.imbalance.rows import make_rows
from benchmarks.imbalance.workloads import BURST_EVERY, WORKLOADS, route
from megatron_llep.config import LLEPConfig
from megatron_llep.offline.machine import describe_machine, read_versions
from megatron_llep.offline.report.results import write_results
from megatron_llep.planner.cost.presets import get_cost_model

QUICK = {"hidden": 32, "ffn": 48, "experts": 8, "tokens": 64, "rounds": 1}


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; refuse flags that do not fit, and end at once if a method goes wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parse(arguments)
    try:
        job = make_job(args)
        check_machine(args.ep)
    except ValueError as error:
        sys.exit(f"error: {error}")
    start, load = time.perf_counter(), os.getloadavg()
    print(f"{describe_machine()}\n{_describe(job)}", flush=True)
    found = run_job(job)
    rows = make_rows(job, found)
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.imbalance", *arguments]),
        "machine": describe_machine(),
        "versions": read_versions(),
        "load": _describe_load(load[0]),
        "described": _describe(job),
        "ranks": _describe_ranks(found),
        "memory": _describe_memory(),
        "sizes": dataclasses.asdict(job.sizes),
        "modes": {name: MODES[name] for name in job.modes},
        "methods": {name: METHODS[name] for name in job.methods},
        "workloads": {
            name: {"summary": WORKLOADS[name].summary, "routing": found[0].digests[name]}
            for name in job.workloads
        },
        "steps": job.steps,
        "rounds": job.rounds,
        "seed": job.seed,
        "history": HISTORY,
        "lla_min_tokens": _choose_min_tokens(job.sizes),
        "tolerance": TOLERANCE,
        "checked": len(rows) * job.steps,
    }
    record["method"] = describe_method(record)
    record["seconds"] = round(time.perf_counter() - start)
    results = args.output / "imbalance.json"
    written = [dataclasses.asdict(row) for row in rows]
    write_results(results, {**record, "rows": written}, machine=record["machine"])
    picture = results.with_suffix(".png")
    draw(rows, f"mode {job.modes[-1]}; {record['described']}; {record['machine']}", picture)
    results.with_suffix(".md").write_text(format_page(record, rows, picture.name))
    print("\n".join(format_table(rows)))
    print(f"{results}, .md, .png   ({record['seconds']} s)")
    return 0


def make_job(args: argparse.Namespace) -> Job:
    """From flags.

    Raises:
        ValueError: names flag, value and way out.
    """
    sizes = LayerSizes(
        num_ranks=args.ep,
        num_experts=args.experts,
        top_k=args.top_k,
        tokens=args.tokens,
        hidden=args.hidden,
        ffn=args.ffn,
    )
    for flag, number in (("--steps", args.steps), ("--rounds", args.rounds)):
        if number < 1:
            raise ValueError(f"{flag} {number}: must be 1 or more")
    if "W7" in args.workloads and args.steps < BURST_EVERY:
        raise ValueError(
            f"--steps {args.steps}: W7 bursts in every {BURST_EVERY}th step; give {BURST_EVERY} or "
            "more, or leave W7 out of --workloads"
        )
    for name in args.workloads:
        route(name, sizes, seed=args.seed)  # raises if the sizes do not fit
    methods: dict[str, LLEPConfig | None] = {FORCED: None}
    for name in args.methods or _choose_methods(args.cost_model):
        methods[_pick("--methods", name, METHODS)] = _configure(name, sizes, args.cost_model)
    return Job(
        sizes=sizes,
        # In their order, as the last one is what the picture shows.
        modes=tuple(m for m in MODES if m in [_pick("--modes", n, MODES) for n in args.modes]),
        workloads=tuple(dict.fromkeys(args.workloads)),
        methods=methods,
        steps=args.steps,
        rounds=args.rounds,
        seed=args.seed,
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.imbalance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # `--quick` looks for what was given
    )
    parser.add_argument("--ep", type=int, default=2, help="ranks that share the experts (2)")
    parser.add_argument("--experts", type=int, default=16, help="(16)")
    parser.add_argument("--top-k", type=int, default=2, help="experts of a token (2)")
    parser.add_argument("--hidden", type=int, default=256, help="(256)")
    parser.add_argument("--ffn", type=int, default=512, help="size of an expert (512)")
    parser.add_argument("--tokens", type=int, default=512, help="of a rank, the mean (512)")
    parser.add_argument("--steps", type=int, default=4, help="different batches in a round (4)")
    parser.add_argument("--rounds", type=int, default=5, help="in which all methods run (5)")
    parser.add_argument("--modes", nargs="+", default=list(MODES), metavar="MODE")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), metavar="W")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}; forced always runs",
    )
    parser.add_argument("--cost-model", help="for auto: a file that `calibrate` wrote, or a preset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny layer, a round: a trial run")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).resolve().parents[1] / "results"
    )
    args = parser.parse_args(argv)
    if args.quick:
        given = {each.partition("=")[0] for each in argv}
        for name, value in QUICK.items():
            if f"--{name}" not in given:
                setattr(args, name, value)
    return args


def _choose_methods(cost_model: str | None) -> list[str]:
    planners = [name for name in PLANNERS if name != AUTO or cost_model is not None]
    return [PLAIN, *planners, EPLB, REPLICATED]


def _configure(name: str, sizes: LayerSizes, cost_model: str | None) -> LLEPConfig | None:
    if name not in PLANNERS:
        return None
    if name != AUTO:
        return LLEPConfig(planner=name, min_tokens_per_gemm=_choose_min_tokens(sizes))
    if cost_model is None:
        raise ValueError(
            "--methods auto: it predicts times; give --cost-model a file that `python -m "
            "megatron_llep calibrate` wrote, or leave auto out"
        )
    get_cost_model(cost_model)  # raises if it cannot be read
    return LLEPConfig(planner=name, cost_model=cost_model)


def _choose_min_tokens(sizes: LayerSizes) -> int:
    """Half of what an expert has on average, and no more than the paper's 1,024."""
    return min(1024, max(1, sizes.num_ranks * sizes.tokens * sizes.top_k // sizes.num_experts // 2))


def _pick(flag: str, name: str, choices: Sequence[str] | dict[str, str]) -> str:
    if name not in choices:
        raise ValueError(f"{flag} {name}: is unknown; choose of {', '.join(choices)}")
    return name


def _describe(job: Job) -> str:
    sizes = job.sizes
    return (
        f"EP {sizes.num_ranks}, {sizes.num_experts} experts, top-{sizes.top_k}, hidden "
        f"{sizes.hidden}, expert {sizes.ffn}, {sizes.tokens} tokens a rank, fp32, SequentialMLP"
    )


def _describe_load(load: float) -> str:
    said = f"{load:.1f} processes at work in the minute before it"
    if load < 0.5:
        return said
    return f"{said}: they disturb times, which then say little; pairs, bytes and memory they do not"


def _describe_ranks(found: Sequence[Found]) -> str:
    if torch.cuda.is_available():
        return f"{len(found)} processes, a GPU each, NCCL"
    cores = "a core of its own" if all(each.pinned for each in found) else "sharing the cores"
    return f"{len(found)} processes, one thread each, {cores}, gloo"


def _describe_memory() -> str:
    if torch.cuda.is_available():
        return "what torch's allocator on the GPU had given out at most."
    return (
        "every operation of torch is watched, and the bytes of all tensors' storages that are "
        "alive after it are added up, whoever holds them; memory that torch's operations do not "
        "make (numpy, gloo's own buffers) is left out."
    )


if __name__ == "__main__":
    sys.exit(main())
