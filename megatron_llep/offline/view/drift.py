"""How the loads of a layer's experts changed: the hottest over time, and how much moved.

Shape letters: L MoE layers, D columns, E experts, R experts that are shown.
"""

from typing import Any

import numpy as np

from megatron_llep.offline.view.columns import Columns

SHOWN_EXPERTS = 16


def encode_drift(expert_loads: np.ndarray, columns: Columns) -> dict[str, Any]:
    """For the page.

    Args:
        expert_loads: [L, D, E] pairs.
        columns: the D of them.

    Returns:
        `experts` of each layer that were the hottest, ascending; their `load` [R * D] in hundredths
        of an average expert's; and the `change` [D - 1] from a column to the next, in thousandths:
        the part of all pairs that went to other experts.
    """
    total = expert_loads.sum(axis=2, keepdims=True)
    share_LDE = expert_loads / np.maximum(total, 1)
    change = np.abs(np.diff(share_LDE, axis=1)).sum(axis=2) / 2
    # Where no token came there is nothing to compare with.
    change *= (total[:, 1:, 0] > 0) & (total[:, :-1, 0] > 0)
    experts = [choose_experts(share_DE) for share_DE in share_LDE]
    E = expert_loads.shape[2]
    loads = [share[:, of].T * E * 100 for share, of in zip(share_LDE, experts, strict=True)]
    return {
        "columns": columns.encode(),
        "experts": [of.tolist() for of in experts],
        "load": [np.rint(load).astype(int).ravel().tolist() for load in loads],
        "change": np.rint(change * 1000).astype(int).tolist(),
    }


def choose_experts(share_DE: np.ndarray) -> np.ndarray:
    """At most `SHOWN_EXPERTS`: those that once were the hottest first, then by their peaks."""
    peak = share_DE.max(axis=0)
    once_hottest = np.zeros(len(peak), bool)
    once_hottest[share_DE.argmax(axis=1)] = True
    order = np.lexsort((-peak, ~once_hottest))
    return np.sort(order[:SHOWN_EXPERTS])
