"""Micro-batches of a run, evenly chosen: the counts of their layers.

Shape letters: N layers of all chosen micro-batches, B micro-batches, P ranks that share tokens,
E experts.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llep.offline.workloads import read_trace

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, modulo 1, spread evenly however many there are, and follow no period."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Layers of some micro-batches; a micro-batch is one group of ranks' part of it."""

    counts: list[np.ndarray]
    """N of int64 [P, E]."""
    batch: np.ndarray
    """int64 [N]: which of the B micro-batches, ascending."""
    batches_of_run: int
    """How many the run has."""
    top_k: int
    moe_layers: int
    """MoE layers of the run, whichever ranks computed them."""
    settings: dict[str, Any] = field(default_factory=dict)
    """LLEP's, in the run; empty if nobody knows."""
    ranks_per_node: int | None = None
    """As the run was told, else as it found; None if nobody knows."""
    ranks_per_host: int | None = None
    """As `--moe-llep-ranks-per-node auto` finds it."""
    model: dict[str, Any] = field(default_factory=dict)
    """Of the layer (`LayerShape`) and `other_flops_per_token`, as far as the run knew them."""

    @property
    def num_ranks(self) -> int:
        """P."""
        return self.counts[0].shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.counts[0].shape[1]

    @property
    def num_batches(self) -> int:
        """B."""
        return int(self.batch[-1]) + 1

    @property
    def layers_per_batch(self) -> float:
        """N / B."""
        return len(self.counts) / self.num_batches

    def sum_by_batch(self, values: np.ndarray) -> np.ndarray:
        """Of values [N], [B]."""
        return np.bincount(self.batch, values, self.num_batches)

    def tokens_by_batch(self) -> np.ndarray:
        """Tokens of the rank with most of them: float [B], mean over layers."""
        most = np.array([int(each.sum(axis=1).max()) for each in self.counts]) / self.top_k
        return self.sum_by_batch(most) / self.sum_by_batch(np.ones(len(most)))


def read_sample(
    folder: Path, most: int, *, num_ranks: int | None = None, num_experts: int | None = None
) -> Sample:
    """Read a recording, or what Megatron traced.

    Args:
        folder: of either.
        most: micro-batches, 1 or more.
        num_ranks: P, which a trace does not say; of a recording it must be P or None.
        num_experts: E, for a trace.

    Raises:
        ValueError: neither is there, it is damaged, or the sizes are missing or do not fit.
        ImportError: it is a recording, and pyarrow is missing.
    """
    if most < 1:
        raise ValueError(f"--steps {most}: give a number of micro-batches, 1 or more")
    if not any(folder.glob("router_trace_rank*.jsonl")):
        return _sample_recording(folder, most, num_ranks)
    if num_ranks is None or num_experts is None:
        raise ValueError(
            f"{folder} is a trace of Megatron's, which does not say everything: give --ep and "
            "--model"
        )
    traced = read_trace(folder, num_ranks=num_ranks, num_experts=num_experts)
    places = np.array([(each.step, each.call, each.group) for each in traced])
    rows, batch, total = choose_rows(places, most)
    return Sample(
        counts=[traced[row].counts for row in rows],
        batch=batch,
        batches_of_run=total,
        top_k=traced[0].top_k,
        moe_layers=len({each.layer for each in traced}),
    )


def _sample_recording(folder: Path, most: int, num_ranks: int | None) -> Sample:
    try:
        from megatron_llep.offline.recording import Recording
    except ImportError as error:
        raise ImportError(
            f"{folder}: recordings need pyarrow: pip install 'megatron-llep[record]'"
        ) from error
    recording = Recording.open(folder)
    info = recording.info
    if num_ranks not in (None, info.num_ranks):
        raise ValueError(
            f"--ep {num_ranks}: {folder} is of {info.num_ranks} ranks that share tokens; leave it "
            "out"
        )
    rows, batch, total = choose_rows(recording.places[:, [0, 1, 3]], most)
    # They are read in the order in which they were written.
    found = {
        (row.step, row.micro_batch, row.layer, row.group): row.counts
        for row in recording.read(rows)
    }
    return Sample(
        counts=[found[tuple(place)] for place in recording.places[rows].tolist()],
        batch=batch,
        batches_of_run=total,
        top_k=info.top_k,
        moe_layers=len(recording.layers),
        settings=info.settings,
        ranks_per_node=info.ranks_per_node,
        ranks_per_host=info.ranks_per_host,
        model=info.model,
    )


def choose_rows(places: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Which rows belong to evenly chosen micro-batches, of those that have all layers.

    The run is cut into `most` parts as long as each other; which micro-batch of a part is taken
    changes from part to part, so that no group and no place in the step is preferred.

    Args:
        places: int [rows, 3]: step, micro-batch, group.
        most: micro-batches.

    Returns:
        int64 [N] rows, by micro-batch; int64 [N] the number of each one's; how many are whole.
    """
    _, of_row, layers = np.unique(places, axis=0, return_inverse=True, return_counts=True)
    whole = np.flatnonzero(layers == layers.max())  # a run that was killed may lack some
    total = len(whole)
    chosen = np.arange(total)
    if total > most:
        ends = np.arange(most + 1) * total // most
        chosen = ends[:-1] + np.floor(np.diff(ends) * _spread(most)).astype(np.int64)
    number = np.full(len(layers), -1)
    number[whole[chosen]] = np.arange(len(chosen))
    rows = np.flatnonzero(number[of_row.ravel()] >= 0)
    batch = number[of_row.ravel()[rows]]
    order = np.argsort(batch, kind="stable")
    return rows[order], batch[order], total


def spread_order(length: int) -> np.ndarray:
    """int64 [length]: an order of 0 .. length - 1 of which every beginning is spread evenly."""
    return np.argsort(_spread(length), kind="stable")


def _spread(length: int) -> np.ndarray:
    """Numbers [length] in 0 .. 1."""
    return np.arange(length) * GOLDEN % 1.0
