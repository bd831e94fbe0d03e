"""What one rank has to lend in one layer, as it stands when a forward begins."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_llep.lending.parcel import Weights
from megatron_llep.placement.rank_note import RankNote


@dataclass(frozen=True, kw_only=True, eq=False)
class Offer:
    """Read off the experts; it needs no plan."""

    note: RankNote = field(default_factory=RankNote)
    """What this rank tells the others of it."""
    experts: str = ""
    """What the experts are made of, or why they are refused (`lending.agreement`)."""
    natives: Sequence[Weights] = ()
    """M experts' weights."""
    weight_waits: Sequence[Callable[[], object]] = ()
    """To be called before the weights are read."""
