"""Steps side by side in a bounded number of columns.

Shape letters: C columns.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """Recorded steps, in equal parts; a column is one part."""

    first: np.ndarray
    """[C] the first step of each, ascending."""
    last: np.ndarray
    """[C] its last."""

    @classmethod
    def split(cls, steps: np.ndarray, most: int) -> "Columns":
        """Split steps, ascending, into `most` columns, or into one each if they are fewer."""
        parts = np.array_split(steps, min(most, len(steps)))
        return cls(
            first=np.array([part[0] for part in parts]), last=np.array([part[-1] for part in parts])
        )

    def __len__(self) -> int:
        return len(self.first)

    def find(self, steps: np.ndarray) -> np.ndarray:
        """The column of each of these steps."""
        return np.searchsorted(self.first, steps, side="right") - 1

    def encode(self) -> dict[str, Any]:
        """For the page."""
        return {"first": self.first.tolist(), "last": self.last.tolist()}
