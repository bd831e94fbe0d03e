"""What one forward of one layer knows: the record that its steps hand on.

Letters: T tokens of this rank, E experts, D replicas of each (1, unless tokens are spread over
replicas), P ranks that share the tokens, M native slots a rank, R sources (these ranks, and their
expert-tensor-parallel ranks).

    route        Routed   the routing, counts on their way to the host, or the plan
    preprocess   Planned  the plan, the loan it asks for, and what starts it
                 Placed   the order in which tokens are sent, and what comes back
    dispatch, compute, combine, postprocess hand Placed on

Layer and dispatcher keep settings only, so several forwards of a layer may be open at once.

Megatron's steps hand on tensors and nothing else. So a record rides on a tensor that one step
returns and the next one takes: on its storage, which is the same when a schedule detaches the
tensor in between.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_llep.placement.counting import CountTable
from megatron_llep.placement.exchange import TokenExchange
from megatron_llep.placement.pairs import Pairs, Placement
from megatron_llep.planner import Plan, load_per_rank

if TYPE_CHECKING:
    from megatron_llep.lending.loan import WeightLoan
    from megatron_llep.lending.offer import Offer


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """What all ranks know and have decided alike."""

    counts: np.ndarray
    """int64 [R, D * E], tokens from each source to each replica of each expert."""
    plan: Plan
    """For D * E experts, M of them native to each rank."""
    trains: int
    """Which weights of its experts some rank needs gradients of, a bit for each; 0 if none."""
    plan_seconds: float


@dataclass(kw_only=True, eq=False)
class Ahead:
    """What was done for a layer before it ran: its routing was known (`ahead.model_chunk`)."""

    decision: Decision
    offer: "Offer"
    loan: "WeightLoan | None" = None
    """On its way, if the plan lends anything."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Routed:
    """What is known when a layer's router has chosen."""

    routing_map: torch.Tensor
    """bool [T, E]."""
    table: CountTable | None
    """All ranks' counts, on their way to the host; None where the plan is made."""
    pairs: Pairs
    """This rank's, listed while the counts travel."""
    offer: "Offer"
    """What this rank has to lend."""
    ahead: Ahead | None = None
    """The plan, and what it lends, where they are there before."""
    place: str = "a layer"
    """Which layer and micro-batch this is, in words."""
    shared_output: torch.Tensor | None = None
    """[..., H] of shared experts that the layer computes beside the routed ones."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Planned(Decision, Routed):
    """What is known before a layer's tokens move."""

    known_ahead: int = 0
    """Layers behind this one whose counts all ranks know."""
    loan: "WeightLoan | None" = None
    """Of the experts that this rank lends and borrows; None where nothing is lent."""
    meanwhile: Callable[[], None] | None = None
    """To be called when tokens are on their way, before anything waits for them."""

    @property
    def load_before(self) -> np.ndarray:
        """int64 [P], tokens on each rank under plain expert parallelism."""
        E = self.routing_map.shape[1]
        counts = self.counts.reshape(len(self.counts), -1, E)
        return load_per_rank(counts.sum(axis=1), counts.shape[1], self.plan.num_ranks)

    @property
    def expert_tokens(self) -> np.ndarray:
        """[E], tokens of each expert, mean over the D groups whose replicas share tokens."""
        E = self.routing_map.shape[1]
        return self.counts.sum(axis=0).reshape(-1, E).mean(axis=0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Placed(Planned):
    """Where this rank's tokens go, and what comes back."""

    placement: Placement
    hidden_shape: torch.Size
    """[..., H] of the layer's input, or of its latent form."""
    probs_dtype: torch.dtype
    exchange: TokenExchange


_RIDER = "megatron_llep_forward"


def hand_on(record: Routed, tensor: torch.Tensor) -> None:
    """Let the record ride on a tensor, until a step takes it."""
    setattr(tensor.untyped_storage(), _RIDER, record)


def find[Record: Routed](kind: type[Record], tensor: torch.Tensor) -> Record | None:
    """The record that rides on a tensor, if there is one which knows as much as `kind`."""
    record = getattr(tensor.untyped_storage(), _RIDER, None)
    return record if isinstance(record, kind) else None


def read[Record: Routed](kind: type[Record], tensor: torch.Tensor) -> Record:
    """The record that rides on a tensor which the step before returned."""
    record = find(kind, tensor)
    assert record is not None, "a step was given other tensors than the step before it returned"
    return record


def take[Record: Routed](kind: type[Record], tensor: torch.Tensor) -> Record:
    """As `read`, and take it off: what the record holds lives no longer than the forward."""
    record = read(kind, tensor)
    delattr(tensor.untyped_storage(), _RIDER)
    return record
