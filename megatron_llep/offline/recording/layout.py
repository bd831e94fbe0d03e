"""What a recording holds, and in which columns.

Shape letters: P ranks that share tokens, E experts, N loans.

A row is one layer of one micro-batch, as one group of P ranks saw it:

    step, micro_batch, layer, group   numbers, see `RecordedLayer`
    counts                            [P * E] tokens, by rank, then expert
    lent                              [N * 3] (expert, borrower, pairs), one after another

The schema's metadata has the `RecordingInfo` as JSON.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_llep.planner.cost.model import LayerShape
from megatron_llep.planner.plan import Plan, plan_from_quota

INFO_KEY = b"megatron_llep"
VERSION = 1
"""Of this layout. A reader refuses later ones."""


@dataclass(frozen=True, kw_only=True)
class RecordingInfo:
    """What is the same in all rows of a recording."""

    num_ranks: int
    """P."""
    num_experts: int
    """E; of several replicas that share tokens each expert counts once a replica."""
    top_k: int
    num_layers: int
    """Layers of the whole model, with those that are no MoE layers, multi-token prediction last."""
    planner: str
    """Which planned, "observe" where plain expert parallelism ran."""
    settings: dict[str, Any] = field(default_factory=dict)
    """LLEP's, as `LLEPConfig` has them."""
    ranks_per_host: int | None = None
    """Of these P ranks, as `--moe-llep-ranks-per-node auto` finds it; None where it finds none, and
    of recordings that do not say it."""
    model: dict[str, Any] = field(default_factory=dict)
    """What the cost model asks of a layer (`LayerShape`), as far as the run knows it."""
    version: int = VERSION

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Ranks, experts, experts a token, layers: the same in all that is one run."""
        return self.num_ranks, self.num_experts, self.top_k, self.num_layers

    @property
    def ranks_per_node(self) -> int | None:
        """As the run was told, else as it found; None: it took all ranks for one node."""
        return self.settings.get("ranks_per_node") or self.ranks_per_host

    @property
    def shape(self) -> LayerShape | None:
        """Of the MoE layers; None where their sizes are not known."""
        known = {each.name for each in dataclasses.fields(LayerShape)}
        given = {name: value for name, value in self.model.items() if name in known}
        if not given.keys() >= {"hidden", "ffn_hidden"}:
            return None
        return LayerShape(**given | {"num_experts": self.num_experts, "top_k": self.top_k})

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def decode(cls, text: bytes) -> "RecordingInfo":
        """What `encode` made.

        Raises:
            ValueError: of a later version, or no such text.
        """
        try:
            info = cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a recording of megatron_llep ({error})") from error
        if info.version > VERSION:
            raise ValueError(
                f"a recording of version {info.version}, and this package reads up to {VERSION}: "
                "use a newer megatron_llep"
            )
        return info


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedLayer:
    """One layer of one micro-batch, as one group of ranks saw it."""

    step: int
    """The training iteration, from 0."""
    micro_batch: int
    """Within the step, from 0."""
    layer: int
    """Of the whole model, from 0."""
    group: int
    """Which of the groups of ranks that share tokens, from 0."""
    counts: np.ndarray
    """int64 [P, E], tokens of each rank for each expert."""
    lent: np.ndarray
    """int64 [N, 3]: expert, borrower, pairs that the borrower computes of it."""

    @property
    def plan(self) -> Plan:
        """What ran; a fall-back where nothing was lent."""
        P, E = self.counts.shape
        quota = np.zeros((E, P), np.int64)
        home = np.arange(E) // (E // P)
        quota[np.arange(E), home] = self.counts.sum(axis=0)
        for expert, borrower, pairs in self.lent.tolist():
            quota[expert, borrower] += pairs
            quota[expert, home[expert]] -= pairs
        return plan_from_quota(quota)


def list_loans(plan: Plan) -> np.ndarray:
    """int64 [N, 3]: (expert, borrower, pairs) of each expert that a plan lends."""
    expert, _, borrower = plan.transfers.T
    return np.column_stack((expert, borrower, plan.quota[expert, borrower])).astype(np.int64)


def make_schema(info: RecordingInfo) -> pa.Schema:
    """The columns of one piece."""
    numbers = pa.list_(pa.int32())
    columns = [
        pa.field("step", pa.int32()),
        pa.field("micro_batch", pa.int32()),
        pa.field("layer", pa.int32()),
        pa.field("group", pa.int32()),
        pa.field("counts", numbers),
        pa.field("lent", numbers),
    ]
    return pa.schema(columns, metadata={INFO_KEY: info.encode()})
