"""How much memory foreign weights take on this rank."""


class ForeignMemory:
    """Counts the bytes of foreign weights that are alive, over all layers and micro-batches."""

    def __init__(self) -> None:
        self.alive = 0
        self.peak = 0

    def hold(self, num_bytes: int) -> None:
        """Count bytes that were allocated."""
        self.alive += num_bytes
        self.peak = max(self.peak, self.alive)

    def release(self, num_bytes: int) -> None:
        """Count bytes that were freed."""
        self.alive -= num_bytes
        assert self.alive >= 0, "more foreign weights freed than held"

    def take_peak(self) -> int:
        """The most bytes alive at once since the last call."""
        peak, self.peak = self.peak, self.alive
        return peak
