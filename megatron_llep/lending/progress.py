"""Where this rank is, for errors: one that loses its peers says in which layer and micro-batch."""

import contextlib
from collections.abc import Iterator


class Progress:
    """The MoE layer that this rank entered last."""

    def __init__(self) -> None:
        self._place = "no MoE layer yet"

    def enter(self, place: str) -> None:
        """Note what begins now."""
        self._place = place

    @contextlib.contextmanager
    def told_in_errors(self) -> Iterator[None]:
        """Add to any error from within where this rank was."""
        try:
            yield
        except Exception as error:
            note = f"megatron_llep: this rank entered last: {self._place}"
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise
