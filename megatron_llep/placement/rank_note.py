"""What a rank tells the others beside its counts, in one number of 64 bits."""

from dataclasses import dataclass

import numpy as np

MASK_BITS = 16
DIGEST_BITS = 44

_LENDS, _REFUSES = 1, 2
_MASK_AT = 2
_DIGEST_AT = _MASK_AT + MASK_BITS


@dataclass(frozen=True, kw_only=True)
class RankNote:
    """Of one forward of one layer."""

    trains: int = (1 << MASK_BITS) - 1
    """Which weights of this rank's experts need gradients, a bit for each (`lending.trained`)."""
    lends: bool = True
    """Whether this rank agrees to lend."""
    refuses: bool = False
    """Whether this rank cannot lend its experts rightly."""
    experts: int = 0
    """Digest, of DIGEST_BITS, of what an expert of this rank is made of."""

    def encode(self) -> int:
        """As one number, of which no bit is the sign's."""
        return (
            _LENDS * self.lends
            | _REFUSES * self.refuses
            | self.trains << _MASK_AT
            | self.experts << _DIGEST_AT
        )


@dataclass(frozen=True, kw_only=True)
class Notes:
    """Of all R sources."""

    trains: int
    """Which weights of an expert need gradients on some source."""
    lends: bool
    """Whether all sources agree to lend."""
    refuses: np.ndarray
    """[R], which sources refuse; others are 0."""
    experts: np.ndarray
    """int64 [R], the digests."""

    @classmethod
    def decode(cls, numbers: np.ndarray) -> "Notes":
        """From what `RankNote.encode` made on each source: int64 [R]."""
        masks = numbers >> _MASK_AT & ((1 << MASK_BITS) - 1)
        return cls(
            trains=int(np.bitwise_or.reduce(masks)),
            lends=bool((numbers & _LENDS).all()),
            refuses=numbers & _REFUSES,
            experts=numbers >> _DIGEST_AT,
        )
