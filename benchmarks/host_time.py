"""Time for which a GPU may have to wait for the host in a layer: from counts to token exchange.

python benchmarks/host_time.py    # prints a table and writes results/host_time.json; a minute

When the counts are there the host plans, starts to lend and orders tokens; then the exchange can
start. One rank of 8 runs the real layer on one core, on tensors so small that what takes time is
Python and the start of operators. The other ranks are stand-ins with the same counts, which send
zeros.
(On a GPU operators are launched instead of run, and LLEP's own kernels place tokens.)

Letters: P ranks, E experts.
"""

import contextlib
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_llep.config import LLEPConfig
from megatron_llep.device import use_cpu_if_no_gpu
from megatron_llep.offline.report.progress import start_progress
from megatron_llep.offline.report.results import write_results
from megatron_llep.offline.report.table import format_table
from megatron_llep.offline.workloads import route_tokens

# As a script this file has its own folder on the path alone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RESULTS = Path(__file__).parent / "results" / "host_time.json"
P, TOKENS = 8, 256
EXPERTS = (128, 256)
WORKLOADS = ("balanced", "lognormal-1", "hot-95-1")
GEMMS = ("megatron", "grouped_mm")
RUNS = 200


def measure(
    experts: tuple[int, ...] = EXPERTS, gemms: tuple[str, ...] = GEMMS, runs: int = RUNS
) -> list[dict[str, Any]]:
    """One row for each number of experts, way to compute them, and workload: medians."""
    from benchmarks.layer_case import BenchLayer, Sizes

    rows = []
    advance = start_progress(len(experts) * len(gemms) * len(WORKLOADS), "running the layer")
    with _be_one_rank():
        for E, gemm in itertools.product(experts, gemms):
            sizes = Sizes(
                num_ranks=P, hidden=16, ffn_hidden=16, num_experts=E, tokens_per_rank=TOKENS
            )
            layer = BenchLayer(sizes, 0, LLEPConfig(expert_gemm=gemm))
            for workload in WORKLOADS:
                routed = route_tokens(
                    workload, num_ranks=P, num_experts=E, tokens_per_rank=TOKENS, top_k=1, rank=0
                )
                layer.route(torch.from_numpy(routed))
                found = _time(layer, runs)
                rows.append({"num_experts": E, "experts": gemm, "workload": workload, **found})
                advance()
    return rows


def _time(layer: Any, runs: int) -> dict[str, Any]:
    """Microseconds to plan, and from the counts to the exchange; after some runs to warm up."""
    dispatcher = layer.module.token_dispatcher
    marks: dict[str, Any] = {}
    exchange = dispatcher.token_dispatch

    def mark(planned: Any) -> None:
        marks["lent"] = len(planned.plan.transfers)
        marks["plan"] = planned.plan_seconds
        marks["start"] = time.perf_counter() - planned.plan_seconds

    def mark_and_exchange(*args: Any) -> Any:
        marks["all"] = time.perf_counter() - marks["start"]
        return exchange(*args)

    taken: dict[str, list[float]] = {"plan": [], "all": []}
    dispatcher.on_plan.append(mark)
    with mock.patch.object(dispatcher, "token_dispatch", mark_and_exchange):
        for run in range(10 + runs):
            layer.run()
            for name in taken if run >= 10 else ():
                taken[name].append(marks[name])
    medians = {f"{k}_us": round(statistics.median(v) * 1e6, 1) for k, v in taken.items()}
    return medians | {"lent": marks["lent"]}


@contextlib.contextmanager
def _be_one_rank() -> Iterator[None]:
    """Process groups of P ranks, of which there is one."""
    from megatron.core import parallel_state, tensor_parallel

    done = SimpleNamespace(wait=lambda: True)

    def gather(output: torch.Tensor, mine: torch.Tensor, **_: Any) -> Any:
        output.view(P, -1).copy_(mine)
        return done

    def exchange(output: torch.Tensor, *_: Any, **__: Any) -> Any:
        output.zero_()
        return done

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=P)
    try:
        parallel_state.initialize_model_parallel(
            expert_model_parallel_size=P, create_gloo_process_groups=False
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        with (
            mock.patch.object(dist, "all_gather_into_tensor", gather),
            mock.patch.object(dist, "all_to_all_single", exchange),
        ):
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def main() -> None:
    """Pin this process to one core, measure, print, save."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    use_cpu_if_no_gpu()
    gc.disable()
    rows = measure()
    print(format_table([list(rows[0]), *(list(row.values()) for row in rows)], "><<>"))
    write_results(RESULTS, {"torch": torch.__version__, "rows": rows})
    print(f"-> {RESULTS}")


if __name__ == "__main__":
    main()
