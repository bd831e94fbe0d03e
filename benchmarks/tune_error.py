"""How far the predictions of `tune` are off: its ratios against those of the real layer.

python benchmarks/tune_error.py      # 5 minutes at most, on two cores; let nothing else run

Fits the cost model to this machine. Then, for each size and workload, Megatron's MoE layer runs
forward and backward at EP = 2 over gloo, each rank on a core of its own, plain and with LLEP in
turn. The routing is recorded, and the recording replayed as `tune` does. Writes
results/tune_error.json and .md. CPU only.
"""

import argparse
import dataclasses
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# As a script this file has its own folder on the path alone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_layer import calibrate_layer
from benchmarks.layer_ranks import BALANCED, PLAIN, Found, Job, time_ranks
from megatron_llep.config import LLEPConfig
from megatron_llep.offline.machine import describe_machine
from megatron_llep.offline.recording import RecordedLayer, RecordingInfo, RecordingWriter
from megatron_llep.offline.recording.layout import list_loans
from megatron_llep.offline.report.results import write_results
from megatron_llep.offline.tune import Replayer, plan_setting, read_sample
from megatron_llep.offline.workloads import get_workload, make_counts
from megatron_llep.planner.cost.model import CostModel, LayerCost, LayerShape
from megatron_llep.planner.topology import ONE_NODE

LAYER = {"num_ranks": 2, "hidden": 512, "ffn_hidden": 1024, "num_experts": 32}
TOKENS = (512, 2048)
"""Of a rank."""
WORKLOADS = (BALANCED, "lognormal-1", "lognormal-2", "zipf", "hot-30-4", "hot-80-4", "hot-95-1")
SETTINGS = {"tolerant": LLEPConfig(planner="tolerant"), "exact": LLEPConfig(planner="exact")}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting under one workload."""

    tokens: int
    """Of a rank."""
    workload: str
    setting: str
    imbalance: float
    """Under plain expert parallelism."""
    lent: int
    """Experts."""
    plain_seconds: float
    """Median over rounds, of the slowest rank."""
    predicted_plain_seconds: float
    ratio: float
    """Plain expert parallelism's time / the setting's: median over rounds of that in a round."""
    quartiles: tuple[float, float]
    """First and third, over rounds."""
    predicted_ratio: float

    @property
    def error(self) -> float:
        """Of the predicted ratio, relative."""
        return self.predicted_ratio / self.ratio - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, predict, print, write."""
    args = _parse(argv)
    if torch.cuda.is_available():
        raise ValueError("tune_error pins ranks to cores: hide the GPUs, CUDA_VISIBLE_DEVICES=''")
    start = time.perf_counter()
    machine, load = describe_machine(), os.getloadavg()[0]
    layer = {"hidden": args.hidden, "ffn_hidden": args.ffn_hidden, "num_experts": args.experts}
    layer["num_ranks"] = LAYER["num_ranks"]
    workloads = [get_workload(name).name for name in args.workloads]
    with tempfile.TemporaryDirectory() as folder:
        model = CostModel.load(
            args.cost_model or calibrate_layer(layer, machine, args.quick, Path(folder))
        )
        rows: list[Row] = []
        for tokens in args.tokens:
            print(f"{tokens} tokens a rank", flush=True)
            job = Job(
                sizes=layer | {"tokens_per_rank": tokens},
                variants={PLAIN: None, **SETTINGS},
                workloads=tuple(workloads),
                rounds=args.rounds,
                with_limit=False,
            )
            rows += make_rows(job, time_ranks(job), model, Path(folder) / f"recording-{tokens}")
    command = shlex.join(["python", "benchmarks/tune_error.py", *sys.argv[1:]])
    results = {
        "command": command,
        "load_before": load,
        "seconds": round(time.perf_counter() - start),
        "layer": layer,
        "rounds": args.rounds,
        "cost_model": dataclasses.asdict(model),
        "rows": [dataclasses.asdict(row) | {"error": row.error} for row in rows],
    }
    page = format_page(
        rows, machine=machine, load=load, command=command, layer=layer, rounds=args.rounds
    )
    write_results(args.output / "tune_error.json", results, machine=machine)
    (args.output / "tune_error.md").write_text(page)
    print(page)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="of a rank")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), metavar="WORKLOAD")
    parser.add_argument("--hidden", type=int, default=LAYER["hidden"])
    parser.add_argument("--ffn-hidden", type=int, default=LAYER["ffn_hidden"])
    parser.add_argument("--experts", type=int, default=LAYER["num_experts"])
    parser.add_argument("--rounds", type=int, default=13)
    parser.add_argument("--cost-model", help="a file that `calibrate` wrote")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="calibrate with few, small sizes")
    return parser.parse_args(argv)


def make_rows(job: Job, found: Sequence[Found], model: CostModel, folder: Path) -> list[Row]:
    """Predict from a recording of what ran, which is written to the folder.

    Raises:
        ValueError: a replayed plan is not the one that ran.
    """
    _record(job, found, folder)
    sample = read_sample(folder, len(job.workloads))
    replayer = Replayer(
        sample.counts, LayerCost(model=model, shape=LayerShape(**sample.model)), ONE_NODE
    )
    rows = []
    for name, setting in job.variants.items():
        if setting is None:
            continue
        replay = replayer.run(setting)
        for number, workload in enumerate(job.workloads):
            ran = found[0].plans[workload, name]
            cost = LayerCost(model=model, shape=LayerShape(**sample.model))
            if plan_setting(sample.counts[number], setting, cost).digest != ran.digest:
                raise ValueError(f"{workload}, {name}: another plan ran than is replayed")
            plain, taken = _worst(found, (workload, PLAIN)), _worst(found, (workload, name))
            low, ratio, high = np.quantile(plain / taken, (0.25, 0.5, 0.75)).tolist()
            rows.append(
                Row(
                    tokens=job.sizes["tokens_per_rank"],
                    workload=workload,
                    setting=name,
                    imbalance=ran.imbalance_before,
                    lent=len(ran.transfers),
                    plain_seconds=float(np.median(plain)),
                    predicted_plain_seconds=float(replayer.plain[number]),
                    ratio=ratio,
                    quartiles=(low, high),
                    predicted_ratio=float(replayer.plain[number] / replay.seconds[number]),
                )
            )
    return sorted(rows, key=lambda row: job.workloads.index(row.workload))


def _record(job: Job, found: Sequence[Found], folder: Path) -> None:
    """A step for each workload, as a run with --moe-llep-record writes it."""
    sizes = dict(job.sizes)
    tokens = sizes.pop("tokens_per_rank")
    shape = LayerShape(
        hidden=sizes["hidden"],
        ffn_hidden=sizes["ffn_hidden"],
        num_experts=sizes["num_experts"],
        top_k=1,
        bytes_per_element=4,
    )
    info = RecordingInfo(
        num_ranks=sizes["num_ranks"],
        num_experts=sizes["num_experts"],
        top_k=1,
        num_layers=1,
        planner="exact",
        model=dataclasses.asdict(shape),
    )
    writer = RecordingWriter(folder, info, "benchmark")
    for step, workload in enumerate(job.workloads):
        counts = make_counts(
            workload,
            num_ranks=sizes["num_ranks"],
            num_experts=sizes["num_experts"],
            tokens_per_rank=tokens,
            top_k=1,
            seed=job.seed,
        )
        lent = list_loans(found[0].plans[workload, "exact"])
        place = {"step": step, "micro_batch": 0, "layer": 0, "group": 0}
        writer.add(RecordedLayer(**place, counts=counts, lent=lent))
    writer.close()


def _worst(found: Sequence[Found], key: tuple[str, str]) -> np.ndarray:
    """Seconds of the slowest rank in each round."""
    return np.max([rank.seconds[key] for rank in found], axis=0)


def format_page(
    rows: Sequence[Row],
    *,
    machine: str,
    load: float,
    command: str,
    layer: dict[str, int],
    rounds: int,
) -> str:
    """The page: what was measured how, the errors, a table."""
    lines = [
        "# Predicted against measured",
        "",
        f"By `{command}`. Machine: {machine}; {load:.1f} other processes ran on it in the minute "
        "before.",
        "",
        f"How measured: one MoE layer of Megatron's, hidden {layer['hidden']}, "
        f"{layer['num_experts']} experts of {layer['ffn_hidden']}, top-1, fp32, forward and "
        f"backward, EP {layer['num_ranks']} over gloo, a core a rank; plain and LLEP in turn, "
        f"{rounds} rounds. Ratio: plain expert parallelism's time / LLEP's, median over rounds, "
        "with quartiles. Predicted: the recorded counts replayed as `tune` does, with a cost model "
        "that was fitted to this machine just before, not to the layer.",
        "",
        f"{_sum_up(rows)}",
        "",
        "| tokens | workload | imbalance | setting | lent | plain ms, predicted | ratio "
        "| quartiles | predicted | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row.quartiles
        cells = (
            row.tokens,
            row.workload,
            f"{row.imbalance:.2f}",
            row.setting,
            row.lent,
            f"{row.plain_seconds * 1e3:.0f}, {row.predicted_plain_seconds * 1e3:.0f}",
            f"{row.ratio:.3f}",
            f"{low:.3f} {high:.3f}",
            f"{row.predicted_ratio:.3f}",
            f"{row.error:+.1%}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _sum_up(rows: Sequence[Row]) -> str:
    """Errors of ratios where something is lent, by size and together; of plain times; of signs."""
    lending = [row for row in rows if row.lent]
    if not lending:
        return "Nothing was lent."
    parts = []
    for tokens in dict.fromkeys(row.tokens for row in lending):
        errors = [abs(row.error) for row in lending if row.tokens == tokens]
        parts.append(f"{tokens} tokens a rank {_describe(errors)}")
    parts.append(f"together {_describe([abs(row.error) for row in lending])}")
    agree = sum((row.ratio > 1) == (row.predicted_ratio > 1) for row in lending)
    idle = [abs(row.ratio - 1) for row in rows if not row.lent]
    control = f" Where nothing is lent, measuring is {max(idle):.1%} off at worst." if idle else ""
    plain = [abs(row.predicted_plain_seconds / row.plain_seconds - 1) for row in rows]
    return (
        f"Error of the ratio where experts are lent: {'; '.join(parts)}. Prediction and "
        f"measurement agree in {agree} of {len(lending)} on whether lending pays. Time of plain "
        f"expert parallelism: {_describe(plain)} off.{control}"
    )


def _describe(errors: Sequence[float]) -> str:
    return f"{statistics.median(errors):.1%} in the median, {max(errors):.1%} at worst"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
