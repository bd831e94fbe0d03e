"""What one layer takes, by what it is spent on."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Predicted seconds of one layer by what they are spent on."""

    compute: float
    exchange: float
    """Tokens and their gradients, four exchanges; two forward only."""
    lending: float
    """Weights of lent experts, what is not hidden."""
    returning: float
    """Gradients of lent experts, what is not hidden."""
    planning: float
    """Work on the host that plain expert parallelism does not have."""

    @property
    def total(self) -> float:
        """The layer's seconds."""
        return self.compute + self.exchange + self.lending + self.returning + self.planning

    @property
    def nanoseconds(self) -> int:
        """The same, whole, for comparisons that must come out alike on every CPU."""
        return round(self.total * 10**9)
