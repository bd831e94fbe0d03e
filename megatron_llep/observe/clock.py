"""Which step of training this is, and which of its micro-batches a layer is in."""

from collections.abc import Callable

from megatron_llep.compat.loop import read_iteration


class StepClock:
    """Tells step and micro-batch of each forward, the same on all ranks of a model.

    A step is an iteration of Megatron's training loop. In other loops it is what runs between two
    reports of metrics that have forwards between them.
    """

    def __init__(self, times_reported: Callable[[], int], first_step: int = 0):
        """Start.

        Args:
            times_reported: how often metrics were reported so far, which all ranks do alike.
            first_step: in loops other than Megatron's.
        """
        self._times_reported = times_reported
        self._last_report = times_reported()
        self._counted = first_step
        self._step: int | None = None
        self._forwards: dict[int, int] = {}

    def restart(self) -> None:
        """Begin anew: another model is trained, or the same one again."""
        self._counted += self._step is not None
        self._last_report = self._times_reported()
        self._step = None

    def tick(self, layer: int) -> tuple[int, int]:
        """Step and micro-batch of a layer's next forward, each from 0."""
        reports = self._times_reported()
        if reports != self._last_report:
            self._counted += self._step is not None
            self._last_report = reports
        iteration = read_iteration()
        step = self._counted if iteration is None else iteration
        if step != self._step:
            self._step, self._forwards = step, {}
        micro_batch = self._forwards.get(layer, 0)
        self._forwards[layer] = micro_batch + 1
        return step, micro_batch
