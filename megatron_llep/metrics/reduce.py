"""One rank's record becomes all ranks': two reductions over a stage and two over its pipeline.

Letters: K metrics, L layers of the whole model (multi-token prediction layers last), E experts,
O rows of an outlook.

A stage is all ranks that have the same layers; a layer is in one stage. L and E are what ranks
agree on, as stages have different layers and Megatron does not tell how many there are in a hybrid
model. They travel with the first reduction, which is made again when L has grown.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llep.metrics.names import METRICS
from megatron_llep.metrics.recorded import Recorded
from megatron_llep.observe.outlook import NUM_ROWS

_LARGEST = tuple(metric.name for metric in METRICS if metric.over_ranks == "max")
_OF_SHARERS = tuple(
    metric.name
    for metric in METRICS
    if metric.over_sharers == "max" and metric.over_ranks == "mean"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reduced:
    """What all ranks of a model know alike."""

    ran: np.ndarray
    """bool [L], whether a micro-batch went through the layer."""
    lends: bool
    """Whether LLEP planned, in any layer."""
    metrics: np.ndarray
    """[K, L]."""
    experts: np.ndarray
    """[E, L] tokens of a micro-batch, mean over expert-parallel groups; E is 0 if not known."""
    outlook: np.ndarray
    """[O, L] sums over all that was planned ahead."""
    other_seconds: float
    """That the rest of the model takes for a token of a rank, in all stages; 0: not known."""


class Reducer:
    """Reduces in the order in which it is called: on all ranks alike."""

    def __init__(self) -> None:
        self.sharers: dist.ProcessGroup | None = None
        """The ranks that share tokens, where experts are lent; on all of them or on none."""
        self.other_seconds = 0.0
        """That this stage takes for a token of a rank, beside routed experts; 0: not known."""
        self._layers: dict[tuple[str, str], int] = {}
        """L as it was, by the names of the groups."""

    def reduce(
        self, recorded: Recorded, pg_collection: ProcessGroupCollection | None
    ) -> Reduced | None:
        """Put the ranks' records together; None if no layer ran anywhere.

        Every rank of the model must call it.
        """
        stage, pipeline = find_groups(pg_collection)
        found = self._agree(recorded, stage, pipeline)
        if found is None:
            return None
        L, E, largest = found
        ran = np.zeros((2, L))
        metrics = np.zeros((len(METRICS), L))
        experts, outlook = np.zeros((E, L)), np.zeros((NUM_ROWS, L))
        for layer in recorded.micro_batches:
            ran[:, layer] = (1, layer in recorded.lending)
            metrics[:, layer] = list(recorded.of_layer(layer).values())
            of_layer = recorded.experts_of_layer(layer)
            if of_layer is not None:
                experts[: len(of_layer), layer] = of_layer
        for layer, sums in recorded.outlook.items():
            outlook[:, layer] = sums
        rows = _find_rows(_OF_SHARERS)
        if self.sharers is not None:
            metrics[rows] = _reduce([metrics[rows]], [self.sharers], dist.ReduceOp.MAX)[0]
        other = np.array([self.other_seconds])
        ran, metrics, experts, outlook, other = _reduce(
            [ran, metrics, experts, outlook, other], [stage, pipeline], dist.ReduceOp.SUM
        )
        size = dist.get_world_size(stage)
        metrics /= size
        metrics[_find_rows(_LARGEST)] = largest
        return Reduced(
            ran=ran[0] > 0,
            lends=bool(ran[1].any()),
            metrics=metrics,
            experts=experts / size,
            outlook=outlook,
            other_seconds=float(other[0]) / size,
        )

    def _agree(
        self, recorded: Recorded, stage: dist.ProcessGroup, pipeline: dist.ProcessGroup
    ) -> tuple[int, int, np.ndarray] | None:
        """L, E, and the metrics [n, L] that are largest of all ranks; None if no layer ran."""
        key = (stage.group_name, pipeline.group_name)
        while True:
            room = self._layers.get(key, 0)
            sizes = np.array([recorded.num_layers, recorded.num_experts], dtype=np.float64)
            largest = np.zeros((len(_LARGEST), room))
            for layer in recorded.micro_batches:
                if layer < room:
                    values = recorded.of_layer(layer)
                    largest[:, layer] = [values[name] for name in _LARGEST]
            sizes, largest = _reduce([sizes, largest], [stage, pipeline], dist.ReduceOp.MAX)
            L, E = map(int, sizes)
            if L == 0:
                return None
            if room >= L:
                return L, E, largest[:, :L]
            self._layers[key] = L


def find_groups(
    pg_collection: ProcessGroupCollection | None,
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The ranks of this pipeline stage, and those of this pipeline: together, all of the model."""
    stage = getattr(pg_collection, "tp_dp_cp", None)
    if stage is None:
        stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    pipeline = getattr(pg_collection, "pp", None)
    if pipeline is None:
        pipeline = parallel_state.get_pipeline_model_parallel_group()
    return stage, pipeline


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """Where collectives take it."""
    return tensor.cuda() if torch.cuda.is_available() else tensor


def _reduce(
    arrays: Sequence[np.ndarray], groups: Sequence[dist.ProcessGroup], operator: dist.ReduceOp
) -> list[np.ndarray]:
    """Reduce arrays together, over one group after another."""
    vector = to_device(torch.from_numpy(np.concatenate([each.ravel() for each in arrays])))
    for group in groups:
        if dist.get_world_size(group) > 1:
            dist.all_reduce(vector, op=operator, group=group)
    numbers = vector.cpu().numpy()
    ends = np.cumsum([each.size for each in arrays])
    parts = np.split(numbers, ends[:-1])
    return [part.reshape(each.shape) for part, each in zip(parts, arrays, strict=True)]


def _find_rows(names: Sequence[str]) -> list[int]:
    return [row for row, metric in enumerate(METRICS) if metric.name in names]
