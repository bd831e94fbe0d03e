"""Time for which a GPU may have to wait for the host in a layer: from counts to token exchange.

    python -m benchmarks.host_time    # or python benchmarks/host_time.py; some minutes

Prints tables and writes results/host_time.json. When the counts are there the host plans, works out
what it sends and receives, and orders tokens; then the exchange can start, and lending behind it.
Plain Megatron has such a span too, and runs beside it, with the same experts.

Letters: P ranks, E experts, M = E / P of them native to a rank, T tokens of a rank.
"""

import argparse
import contextlib
import gc
import itertools
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from megatron_llep.config import LLEPConfig
from megatron_llep.device import use_cpu_if_no_gpu
from megatron_llep.offline.one_rank import HostSpan, be_one_rank
from megatron_llep.offline.report.progress import start_progress
from megatron_llep.offline.report.results import write_results
from megatron_llep.offline.report.table import format_table
from megatron_llep.offline.timing import take_turns
from megatron_llep.offline.workloads import route_tokens

# As a script this file has its own folder on the path alone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RESULTS = Path(__file__).parent / "results" / "host_time.json"
RANKS, EXPERTS, TOKENS = (8, 16, 64), (128, 256), 256
BALANCED, SEVEN, RANDOM = "nothing lent", "7 lent", "lognormal-1"
WORKLOADS = (BALANCED, SEVEN, RANDOM)
KINDS = {"SequentialMLP": "megatron", "grouped_mm": "grouped_mm"}
"""Of experts: the flag's value under which LLEP computes them."""
PARTS = ("plan", "loan", "list", "order")
BEHIND = "lend"
ROUNDS, WARM_UP = 100, 10
CLOCK = time.thread_time
METHOD = f"""\
One rank (rank 0) of P runs the real layer, forward and backward, on one core; the others are not
there: collectives return at once, with this rank's counts for every rank's. {TOKENS} tokens a rank,
top-1, hidden size 16, planner tolerant, fp32: so small that what takes time is Python and the start
of operators. On a GPU operators are launched instead of run, and LLEP's kernels place tokens.
Plain Megatron's layer and LLEP's have the same experts and routing; they run in turn, each first in
every second round, and every number is the median of the rounds, by itself, in seconds of the
processor: what other processes do on a busy machine is left out, but for the caches.
  all      from the counts' arrival to the call of the token all-to-all
  plan     plan_over_replicas, make_plan within
  loan     the loan is made: what this rank lends, and that it does
  list     what is sent and comes, and in which order
  order    places of tokens; rows are gathered
  rest     of all: checks, records, autograd nodes
  lend     not of all, as tokens are on their way: buffers, packing, the weights' all-to-all
  layer    forward and backward, router included
  backward of it: from the output's gradient to that of the layer's input"""


def measure(
    ranks: tuple[int, ...] = RANKS, experts: tuple[int, ...] = EXPERTS, rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """One row for each number of ranks and of experts, kind of experts, and workload."""
    from benchmarks.layer_case import BenchLayer, Sizes

    rows = []
    cases = list(itertools.product(ranks, experts, KINDS))
    advance = start_progress(len(cases) * len(WORKLOADS), "running the layer")
    for P, E, kind in cases:
        with be_one_rank(0, P):
            sizes = Sizes(
                num_ranks=P, hidden=16, ffn_hidden=16, num_experts=E, tokens_per_rank=TOKENS
            )
            lending = BenchLayer(sizes, 0, LLEPConfig(expert_gemm=KINDS[kind]))
            plain = BenchLayer(sizes, 0, None)
            plain.share_experts(lending)
            for workload in WORKLOADS:
                routed = torch.from_numpy(route(workload, P, E))
                lending.route(routed)
                plain.route(routed)
                case = {"ranks": P, "num_experts": E, "experts": kind, "workload": workload}
                rows.append(case | _time(lending, plain, rounds))
                advance()
    return rows


def route(workload: str, num_ranks: int, num_experts: int) -> np.ndarray:
    """Experts [T, 1] of each rank's tokens.

    Under `SEVEN` rank 0 has a number of hot experts, and seven ranks have half of the mean load:
    each of them can take a half from rank 0, mostly one expert.
    """
    P, E = num_ranks, num_experts
    if workload != SEVEN:
        name = "balanced" if workload == BALANCED else workload
        return route_tokens(
            name, num_ranks=P, num_experts=E, tokens_per_rank=TOKENS, top_k=1, rank=0
        )
    M, cold = E // P, 7
    shares = np.ones((P, M)) / M
    shares[1 : 1 + cold] /= 2
    hot = min(cold, M)
    shares[0, :hot] += cold / 2 / hot
    ends = np.rint(shares.ravel().cumsum() / P * TOKENS).astype(int)
    return np.repeat(np.arange(E), np.diff(ends, prepend=0))[:, None]


def _time(lending: Any, plain: Any, rounds: int) -> dict[str, Any]:
    """Medians of both layers; microseconds, of the whole layer milliseconds."""
    layers = {"llep": lending, "plain": plain}
    taken: dict[str, list[float]] = {}
    lent: list[int] = []
    lending.module.token_dispatcher.on_plan[:] = [
        lambda planned: lent.append(len(planned.plan.transfers))
    ]
    with _watch(lending.module.token_dispatcher) as parts:
        for name, counts in take_turns(list(layers), rounds, warm_up=WARM_UP):
            span = HostSpan(layers[name].module.token_dispatcher, CLOCK)
            parts.clear()
            start = CLOCK()
            output = layers[name].run_forward()
            middle = CLOCK()
            layers[name].run_backward(output)
            end = CLOCK()
            found = {
                f"{name}_all_us": span.taken[0] * 1e6,
                f"{name}_layer_ms": (end - start) * 1e3,
                f"{name}_backward_ms": (end - middle) * 1e3,
            }
            if name == "llep":
                parts["order"] -= parts["list"]
                found |= {f"{part}_us": parts[part] * 1e6 for part in (*PARTS, BEHIND)}
                found["rest_us"] = (span.taken[0] - sum(parts[part] for part in PARTS)) * 1e6
            for key, value in found.items() if counts else ():
                taken.setdefault(key, []).append(value)
    medians = {key: round(statistics.median(values), 2) for key, values in taken.items()}
    return {"lent": lent[-1]} | medians


@contextlib.contextmanager
def _watch(layer_dispatcher: Any) -> Iterator[Counter[str]]:
    """Seconds of each part, from outside; `order` with `list` in it."""
    from megatron_llep import dispatcher
    from megatron_llep.lending.loan import WeightLoan
    from megatron_llep.placement.exchange import TokenExchange

    parts: Counter[str] = Counter()

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = CLOCK()
            result = call(*args, **kwargs)
            parts[part] += CLOCK() - start
            return result

        return run

    with contextlib.ExitStack() as stack:
        for part, owner, name in (
            ("plan", dispatcher, "plan_over_replicas"),
            ("loan", WeightLoan, "__init__"),
            (BEHIND, WeightLoan, "start_fetch"),
            ("order", layer_dispatcher, "dispatch_preprocess"),
            ("list", TokenExchange, "of"),
        ):
            replaced = timed(part, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, replaced))
        yield parts


def format_tables(rows: list[dict[str, Any]]) -> str:
    """The spans, then the whole layer."""
    head = ["P", "E", "experts", "workload", "lent"]
    spans = [[*head, *PARTS, "rest", "all us", "plain's", "difference", BEHIND]]
    layers = [[*head, "layer ms", "plain's", "ratio", "backward ms", "plain's", "ratio"]]
    for row in rows:
        case = [row[key] for key in ("ranks", "num_experts", "experts", "workload", "lent")]
        both = [row["llep_all_us"], row["plain_all_us"]]
        us = [*(row[f"{part}_us"] for part in (*PARTS, "rest")), *both, both[0] - both[1]]
        us.append(row[f"{BEHIND}_us"])
        spans.append([*case, *(f"{each:.0f}" for each in us)])
        times = []
        for part in ("layer", "backward"):
            ms = [row[f"llep_{part}_ms"], row[f"plain_{part}_ms"]]
            times += [*ms, ms[0] / ms[1]]
        layers.append([*case, *(f"{each:.2f}" for each in times)])
    return "\n\n".join(format_table(table, ">><<>") for table in (spans, layers))


def main() -> None:
    """Pin this process to one core, measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    use_cpu_if_no_gpu()
    gc.disable()
    rows = measure(rounds=args.rounds)
    method = f"{METHOD}\nMedians of {args.rounds} rounds, after {WARM_UP}."
    print(f"{method}\n\n{format_tables(rows)}")
    write_results(
        args.output, {"torch": torch.__version__, "method": method.splitlines(), "rows": rows}
    )
    print(f"-> {args.output}")


if __name__ == "__main__":
    main()
