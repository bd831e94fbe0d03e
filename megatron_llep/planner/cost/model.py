"""How long one MoE layer takes under a plan: forward and backward, or forward, on the worst rank.

Shape letters: P ranks, E experts, L links (inside the node, across nodes). A pair is one token at
one of its top_k experts.

The steps of a layer wait for each other (count, dispatch, compute, combine, and the mirror image in
backward), so each counts with its slowest rank, and they add up:

- compute: a GEMM of n tokens runs at the rate R * n / (n + h), where h (half_rate_tokens) is the
  number at which half the rate R is reached. So n tokens of an expert take F * (n + h) / R, F their
  FLOPs a token, and every slot in use costs h tokens and a fixed overhead more.
- exchange: pairs are copied into order at both ends, and those of other ranks cross the links, by
  the law in `link`.
- lending and return: experts, and their gradients, are copied at both ends and cross the same links
  beside a token exchange; in two exchanges, one after the other, if some go in shards. Running them
  at once with tokens saves time where one uses what the other leaves free, such as the other
  direction of a link; `overlap` is the share of that which is saved.

Ranks on unlike CPUs must predict the same: times are rounded to whole picoseconds before those of
several ranks, links or steps are added or compared.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_llep.lending.fan_out import SCATTER_FROM
from megatron_llep.planner.cost.layer_time import LayerTime
from megatron_llep.planner.cost.link import Link, join_ways, time_links, time_starts
from megatron_llep.planner.cost.picoseconds import (
    PER_SECOND,
    all_to_picoseconds,
    to_picoseconds,
)
from megatron_llep.planner.cost.traffic import LinkLoad, count_lending, count_tokens
from megatron_llep.planner.prices import Prices

if TYPE_CHECKING:  # the planners import this module
    from megatron_llep.planner.plan import Plan
    from megatron_llep.planner.topology import Topology

EXCHANGES = 4
"""Token exchanges of a layer: dispatch and combine, each forward and backward."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes of a layer's experts, as one rank holds them, and of what travels."""

    hidden: int
    """Numbers in a token."""
    ffn_hidden: int
    """Inner size of an expert on one rank (under expert tensor parallelism its share)."""
    num_experts: int
    """E."""
    top_k: int
    """Experts a token goes to."""
    gated: bool = True
    """Three matrices an expert (SwiGLU) instead of two."""
    bytes_per_element: int = 2
    """Of tokens, and of weights if nothing else is said."""
    bytes_per_weight: int | None = None
    """Of the weights that are lent; None: as tokens."""
    bytes_per_gradient: int = 4
    """Of the weight gradients that return."""
    refetch: bool = False
    """Lent weights are sent a second time, in backward."""
    scatter_from: int = SCATTER_FROM
    """Borrowers from which on a lent expert goes in shards; 0: none does."""

    @property
    def expert_weights(self) -> int:
        """Numbers in one expert's matrices."""
        return (3 if self.gated else 2) * self.hidden * self.ffn_hidden

    @property
    def weight_bytes(self) -> int:
        """Bytes of one number of a lent expert's weights."""
        return self.bytes_per_element if self.bytes_per_weight is None else self.bytes_per_weight

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights, as they are lent."""
        return self.expert_weights * self.weight_bytes

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one expert's gradients on their way home."""
        return self.expert_weights * self.bytes_per_gradient

    @property
    def token_bytes(self) -> int:
        """Bytes of one token on its way."""
        return self.hidden * self.bytes_per_element

    @property
    def prices(self) -> Prices:
        """What a loan of one of the layer's experts takes of links between nodes."""
        both_passes = 2 * self.token_bytes
        return Prices(
            weights=self.expert_bytes * (1 + self.refetch) // both_passes,
            gradients=self.gradient_bytes // both_passes,
            scatter_from=self.scatter_from,
        )

    @property
    def flops_per_token(self) -> int:
        """FLOPs of one pair, forward."""
        return 2 * self.expert_weights


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """A machine, as far as one MoE layer is concerned. Rates are of one rank."""

    machine: str
    """In words: what it is, and where the numbers come from."""
    flops_per_second: float
    """Of a large expert, forward."""
    half_rate_tokens: float
    """Tokens at which an expert's GEMMs run at half that rate."""
    gemm_overhead_seconds: float
    """Of one slot in use, forward."""
    backward_factor: float
    """Backward / forward of an expert; 2 by FLOPs."""
    copy_bytes_per_second: float
    """Of what is sent, at either end of an exchange."""
    intra_node: Link
    inter_node: Link
    overlap: float
    """0 .. 1: how much of the time is saved that two exchanges at once can save at most."""
    planning_seconds: float
    """Planning and placing of one layer that lends, on the host."""

    def __post_init__(self) -> None:
        """Reject numbers that describe no machine.

        Raises:
            ValueError: names the field, its value and what it may be.
        """
        positive = ("flops_per_second", "copy_bytes_per_second", "backward_factor")
        not_negative = ("half_rate_tokens", "gemm_overhead_seconds", "planning_seconds", "overlap")
        numbers = {name: getattr(self, name) for name in positive + not_negative}
        for name in ("intra_node", "inter_node"):
            numbers |= {f"{name}.{k}": v for k, v in vars(getattr(self, name)).items()}
        for name, value in numbers.items():
            zero_allowed = name in not_negative or name.endswith(
                ("latency_seconds", "burst_bytes", "burst_cost", "opposite_cost")
            )
            if not (math.isfinite(value) and (value > 0 or (value == 0 and zero_allowed))):
                limit = "0 or more" if zero_allowed else "above 0"
                raise ValueError(f"cost model: {name}={value} must be finite and {limit}")
        for name, value in numbers.items():
            if name.endswith(("overlap", "burst_cost", "opposite_cost")) and value > 1:
                raise ValueError(f"cost model: {name}={value} must lie in 0 .. 1")

    def predict_layer(
        self,
        plan: "Plan",
        counts: np.ndarray,
        shape: LayerShape,
        topology: "Topology",
        *,
        forward_only: bool = False,
        order: str = "local_first",
    ) -> LayerTime:
        """Predict one layer of one micro-batch, forward and backward.

        Args:
            plan: made from the counts; a fall-back is predicted as plain expert parallelism.
            counts: integers [P, E], pairs of each rank for each expert.
            shape: of the layer.
            topology: which ranks share a node.
            forward_only: leave out backward, and with it gradients and weights fetched again.
            order: which tokens go to which holder, of `planner.assignment.ORDERS`.
        """
        passes, exchanges = 1 + self.backward_factor, EXCHANGES
        if forward_only:
            passes, exchanges = 1, EXCHANGES // 2
        pairs = count_tokens(plan, counts, topology, order)
        tokens = time_links(self._links, pairs, shape.token_bytes)
        load = plan.load_per_rank_after
        copied = self._time_copies(counts.sum(axis=1) + load, shape.token_bytes)
        exchange = int((copied + join_ways(self._links, tokens)).max())
        exchange += time_starts(self._links, pairs > 0)
        lending = returning = planning = 0
        if not plan.is_fallback:
            traffic = count_lending(plan, shape.expert_weights, shape.scatter_from, topology)
            lending = self._time_transfers(traffic, shape.weight_bytes, tokens)
            if not forward_only:
                if shape.refetch:  # again, beside the backward of combine
                    lending *= 2
                returning = self._time_transfers(traffic, shape.bytes_per_gradient, tokens)
            planning = to_picoseconds(self.planning_seconds)
        compute = self._time_compute(load, (plan.quota > 0).sum(axis=0), shape)
        return LayerTime(
            compute=round(compute * passes) / PER_SECOND,
            exchange=exchanges * exchange / PER_SECOND,
            lending=lending / PER_SECOND,
            returning=returning / PER_SECOND,
            planning=planning / PER_SECOND,
        )

    def break_even_tokens(self, shape: LayerShape, link: Link) -> float:
        """Tokens of a lent expert above which lending pays even where none of it is hidden.

        They take as long to compute as the expert takes to cross the link, there and back.
        """
        crossing = shape.expert_bytes * (1 + shape.refetch) + shape.gradient_bytes
        seconds_per_token = shape.flops_per_token / self.flops_per_second
        return crossing / link.bytes_per_second / (seconds_per_token * (1 + self.backward_factor))

    @property
    def _links(self) -> tuple[Link, Link]:
        return self.intra_node, self.inter_node

    def _time_compute(self, load: np.ndarray, slots: np.ndarray, shape: LayerShape) -> int:
        """Picoseconds of the experts' GEMMs on the slowest rank, forward.

        Args:
            load: [P] pairs each rank computes.
            slots: [P] experts each rank has pairs of.
            shape: of the layer.
        """
        seconds_per_token = shape.flops_per_token / self.flops_per_second
        per_slot = self.half_rate_tokens * seconds_per_token + self.gemm_overhead_seconds
        forward = all_to_picoseconds(load * seconds_per_token)
        forward += all_to_picoseconds(slots * per_slot)
        return int(forward.max())

    def _join(self, ways: np.ndarray) -> int:
        """Picoseconds of an exchange whose ways keep links busy for so long, [L, 2, P]."""
        return int(join_ways(self._links, ways).max())

    def _time_copies(self, things: np.ndarray, size: float) -> np.ndarray:
        """Picoseconds to copy things [...] of `size` bytes at one end of an exchange."""
        return all_to_picoseconds(things * (size / self.copy_bytes_per_second))

    def _time_transfers(
        self, traffic: tuple[LinkLoad, ...], size: float, tokens: np.ndarray
    ) -> int:
        """Picoseconds of exchanges of numbers of `size` bytes, one after another, not hidden.

        What may be hidden: they go while tokens keep links busy for `tokens` [L, 2, P] picoseconds.
        """
        busy = [time_links(self._links, each.numbers, size) for each in traffic]
        time = sum(self._join(each) for each in busy)
        together = max(time, self._join(sum(busy) + tokens))
        time -= round(self.overlap * (time + self._join(tokens) - together))
        for each in traffic:
            # Packed where they come from, then crossing, then unpacked.
            packed, unpacked = self._time_copies(each.numbers.sum(axis=0), size).max(axis=1)
            time += time_starts(self._links, each.messages) + int(packed) + int(unpacked)
        return time

    def digest(self) -> str:
        """Short hash of all numbers: equal on ranks whose models are equal."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the model as JSON."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "CostModel":
        """Read what `save` wrote.

        Raises:
            ValueError: the file cannot be read, or is no cost model; names the file.
        """
        remedy = "write one with `python -m megatron_llep calibrate`"
        try:
            values = json.loads(Path(path).read_text())
            for name in ("intra_node", "inter_node"):
                values[name] = Link(**values[name])
            return cls(**values)
        except OSError as error:
            raise ValueError(f"cost model {path}: {error.strerror}; {remedy}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"cost model {path}: not a cost model ({error}); {remedy}") from error


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What planner auto needs to know: the machine, and the layer that runs on it."""

    model: CostModel
    shape: LayerShape

    def predict(self, plan: "Plan", counts: np.ndarray, topology: "Topology") -> LayerTime:
        """As `CostModel.predict_layer`."""
        return self.model.predict_layer(plan, counts, self.shape, topology)
