"""`simulate`: predict a model's steps under plain EP, each planner, and replica placement."""

import argparse
import dataclasses
import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llep.offline.cli.replay import Replay, open_if_recording
from megatron_llep.offline.cli.routing import (
    add_routing_arguments,
    list_workloads,
    trace_counts,
    workload_counts,
)
from megatron_llep.offline.nodes import Nodes, find_nodes
from megatron_llep.offline.report.progress import start_progress
from megatron_llep.offline.report.results import write_results
from megatron_llep.offline.report.table import format_table
from megatron_llep.offline.simulator.models import (
    MODELS,
    ModelShape,
    get_model,
    model_of_recording,
)
from megatron_llep.offline.simulator.report import (
    Result,
    draw_speedups,
    group_by_model,
    make_detail_table,
    make_speedup_table,
    write_html,
)
from megatron_llep.offline.simulator.run import METHODS, Case, simulate
from megatron_llep.offline.workloads import PAPER_GRID
from megatron_llep.planner.cost.model import CostModel
from megatron_llep.planner.cost.presets import PRESETS, get_cost_model

if TYPE_CHECKING:
    from megatron_llep.offline.recording import Recording


STEPS, RECORDED_STEPS = 10, 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Predict time, memory and traffic of a model's steps, forward and backward, under plain\n"
        "expert parallelism, each planner, replicas placed by recent loads (eplb), the same with\n"
        "tokens spread by a linear program (eplb+lp), and perfect balance for nothing (optimum).\n"
        "Without flags: the three models and the skews of the LLEP paper, on 8 ranks."
    )
    parser.epilog = list_workloads()
    parser.add_argument(
        "--model",
        nargs="+",
        help=f"of {', '.join(MODELS)}, or a file as in configs/; default: the recording's, else "
        "all three",
    )
    parser.add_argument(
        "--workload",
        nargs="+",
        default=["paper"],
        help="one or several; default: paper, which is balanced and all hot-*",
    )
    parser.add_argument("--ep", type=int, nargs="+", help="ranks; default: 8, or the recording's")
    parser.add_argument("--tokens", type=int, help="of a rank; default: the model's")
    parser.add_argument("--experts", type=int, help="instead of the model's number of experts")
    add_routing_arguments(parser)
    parser.add_argument(
        "--machine",
        default="h200",
        help=f"of {', '.join(PRESETS)} (from data sheets), or a file that calibrate wrote; "
        "default: %(default)s",
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--layers", type=int, default=1, help="simulated; default: 1")
    parser.add_argument(
        "--steps",
        type=int,
        help=f"simulated; default: {STEPS}. Of a recording so many micro-batches, chosen evenly "
        f"over all of it, default: {RECORDED_STEPS} at most; if some are left out, eplb goes by "
        "older loads than it would have. Of Megatron's trace: all",
    )
    parser.add_argument(
        "--replace-every", type=int, default=10, help="steps between placements of eplb"
    )
    parser.add_argument(
        "--spare-slots", type=int, default=1, help="experts a rank holds beyond its share for eplb"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="for simulate.json, .png and .html"
    )


def run(args: argparse.Namespace) -> int:
    """Simulate, print tables, and write the files if asked to."""
    cost = get_cost_model(args.machine)
    for flag in ("layers", "steps", "replace_every"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1")
    if args.spare_slots < 0:
        raise ValueError("--spare-slots must be at least 0")
    recording = open_if_recording(args.trace) if args.trace else None
    models = _find_models(args, recording)
    methods = tuple(method for method in METHODS if method in {"plain", *args.methods})
    if args.output and methods == ("plain",):
        raise ValueError(
            "--methods plain leaves nothing to draw beside plain expert parallelism: name another "
            "method, or leave out --output"
        )
    if args.trace:
        routings = [args.trace.name]
    else:
        paper = ["balanced", *PAPER_GRID]
        routings = [w for given in args.workload for w in (paper if given == "paper" else [given])]
    ranks = args.ep or [8 if recording is None else recording.info.num_ranks]
    wanted = list(product(models, ranks, routings))
    cases = [_make_case(args, cost, recording, *each) for each in wanted]
    advance = start_progress(sum(case.steps for case, *_ in cases), "simulating")
    results = []
    for (model, num_ranks, routing), (case, tokens, _) in zip(wanted, cases, strict=True):
        results.append(
            Result(
                model=model.name,
                routing=routing,
                num_ranks=num_ranks,
                tokens_per_rank=tokens,
                outcomes=simulate(case, methods, advance),
            )
        )
    print(f"predicted, not measured; machine: {cost.machine}")
    if recording is not None:
        print(_describe_recording(recording, cases[0][0]))
    if recording is not None or args.ranks_per_node is not None:
        nodes = {f"EP {each.num_ranks}: {each}": None for *_, each in cases}
        print(f"nodes: {'; '.join(nodes)}")
    for head, of_model in group_by_model(results).items():
        print(f"\n{head}")
        if len(of_model) == 1:
            print(of_model[0].label)
            print(format_table(make_detail_table(of_model[0])))
        else:
            print(format_table(make_speedup_table(of_model)))
    if args.output:
        _write(args.output, results, cost)
    return 0


def _find_models(args: argparse.Namespace, recording: "Recording | None") -> list[ModelShape]:
    """Those asked for; of a recording with experts as many as it has, and as many a token."""
    if recording is None:
        return [_get_model(name, args.experts) for name in args.model or MODELS]
    if args.model is None:
        return [model_of_recording(recording)]
    info = recording.info
    models = []
    for name in args.model:
        model = _get_model(name, args.experts)
        if model.layer.num_experts != info.num_experts:
            raise ValueError(
                f"--model {name}: it has {model.layer.num_experts} experts, and {args.trace} was "
                f"recorded with {info.num_experts}; give --experts {info.num_experts} as well, or "
                "leave --model out"
            )
        layer = dataclasses.replace(model.layer, top_k=info.top_k)
        models.append(dataclasses.replace(model, layer=layer))
    return models


def _describe_recording(recording: "Recording", case: Case) -> str:
    """What of it is simulated."""
    text = (
        f"recorded: {recording.folder}, steps {recording.steps[0]} to {recording.steps[-1]}, "
        f"{case.layers} layers, planner {recording.info.planner}; {case.steps} micro-batches of it"
    )
    if not case.model.other_flops_per_token:
        text += "; what else the model computes is not known, and a step is its MoE layers alone"
    return text


def _get_model(name: str, num_experts: int | None) -> ModelShape:
    model = get_model(name)
    if num_experts is None:
        return model
    layer = dataclasses.replace(model.layer, num_experts=num_experts)
    return dataclasses.replace(model, layer=layer)


def _make_case(
    args: argparse.Namespace,
    cost: CostModel,
    recording: "Recording | None",
    model: ModelShape,
    num_ranks: int,
    routing: str,
) -> tuple[Case, int, Nodes]:
    """What to simulate, its most tokens a rank, and its nodes."""
    layers, steps, recorded = args.layers, args.steps or STEPS, None
    E, K = model.layer.num_experts, model.layer.top_k
    tokens = args.tokens or model.tokens_per_rank
    if recording is not None:
        replay = Replay.of(recording, num_ranks=num_ranks, num_experts=args.experts, flag="--ep")
        recorded = replay.ranks_per_node
        counts, steps = replay.load(args.steps or RECORDED_STEPS)
        layers = replay.layers
        tokens = int(counts(0, 0).sum(axis=1).max()) // K
    elif args.trace:
        counts, layers, steps = trace_counts(args.trace, num_ranks, E)
        tokens = int(counts(0, 0).sum(axis=1).max()) // K
    else:
        counts = workload_counts(
            routing,
            num_ranks=num_ranks,
            num_experts=E,
            tokens=tokens,
            top_k=K,
            seed=args.seed,
            repeat_experts=args.repeat_experts,
        )
    nodes = find_nodes(args.ranks_per_node, num_ranks, recorded)
    case = Case(
        model=model,
        cost=cost,
        topology=nodes.topology,
        make_counts=counts,
        layers=layers,
        steps=steps,
        replace_every=args.replace_every,
        spare_slots=args.spare_slots,
    )
    return case, tokens, nodes


def _write(folder: Path, results: list[Result], cost: CostModel) -> None:
    """Write simulate.png, simulate.json and simulate.html."""
    command = " ".join(["python -m megatron_llep", *sys.argv[1:]])
    picture = folder / "simulate.png"
    draw_speedups(results, picture)
    record = {"command": command, "results": [dataclasses.asdict(result) for result in results]}
    write_results(folder / "simulate.json", record, machine=dataclasses.asdict(cost))
    write_html(folder / "simulate.html", results, picture, cost.machine, command)
    print(f"\nwritten: simulate.json, .png and .html in {folder}")
