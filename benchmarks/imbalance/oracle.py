"""What must have happened, checked exactly: which token went where, with which weight.

Numpy alone: what is checked was read off the tokens and weights that an expert was given
(`witness`), not off what a dispatcher says it did.

Letters: P ranks, E experts, N tokens of all ranks, K experts of a token, n pairs of a rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.imbalance.workloads import Routing

TOLERANCE = 2e-5
"""Largest difference / largest number of the reference: of outputs and of every gradient."""
WEIGHT_TOLERANCE = 1e-6
"""The same of the router's weights, which are softmaxes of K numbers."""


class OracleError(RuntimeError):
    """A method did something else than the routing says."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """The pairs that one rank computed."""

    token: np.ndarray
    """int64 [n], which of N."""
    expert: np.ndarray
    """int64 [n], whose weights it met."""
    weight: np.ndarray
    """float [n], the router's, with which its output counts."""


def check_pairs(
    records: Sequence[Record],
    routing: Routing,
    *,
    weights: np.ndarray,
    quota: np.ndarray,
    tolerance: float = WEIGHT_TOLERANCE,
) -> None:
    """Check that every pair was computed once, at a rank that the method says, rightly weighted.

    Args:
        records: of all ranks, in their order.
        routing: what was to be done.
        weights: float [N, K], the router's of each pair.
        quota: int64 [E, P], pairs of each expert that each rank was to compute.
        tolerance: of weights.

    Raises:
        OracleError: names the first pairs that are wrong, and the rank.
    """
    K, E = routing.experts.shape[1], routing.num_experts
    place = np.repeat(np.arange(len(records)), [len(each.token) for each in records])
    token, expert, weight = (
        np.concatenate([getattr(each, name) for each in records])
        for name in ("token", "expert", "weight")
    )
    wanted = np.repeat(np.arange(len(routing.experts)), K) * E + routing.experts.ravel()
    found = token * E + expert
    for what, pairs in (
        ("were computed, though no token chose so", found[~np.isin(found, wanted)]),
        ("were not computed", wanted[~np.isin(wanted, found)]),
        ("were computed more than once", _repeated(found)),
    ):
        if len(pairs):
            said = "; ".join(_tell(pair, E, found, place) for pair in pairs[:3].tolist())
            raise OracleError(f"{len(pairs)} (token, expert) pairs {what}: {said}")
    # Each once, so that both can be put in one order.
    order, of_wanted = np.argsort(found), np.argsort(wanted)
    off = np.abs(weight[order] - weights.ravel()[of_wanted]) > tolerance
    if off.any():
        first = int(np.flatnonzero(off)[0])
        raise OracleError(
            f"{int(off.sum())} pairs were computed with another weight than the router's: "
            f"{_tell(int(found[order][first]), E, found, place)} with {weight[order][first]:.7f}, "
            f"not {weights.ravel()[of_wanted][first]:.7f}"
        )
    cells = np.bincount(expert * len(records) + place, minlength=quota.size).reshape(quota.shape)
    if (wrong := np.argwhere(cells != quota)).size:
        at, rank = wrong[0].tolist()
        raise OracleError(
            f"rank {rank} computed {cells[at, rank]} pairs of expert {at}, and the method says "
            f"{quota[at, rank]}"
        )


def check_numbers(
    found: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    *,
    tolerance: float,
    rounding: Mapping[str, float] | None = None,
) -> float:
    """Check outputs and gradients by name; the largest difference, relative.

    Args:
        found: by name.
        reference: by the same names.
        tolerance: of a difference, relative to the largest number of the reference.
        rounding: by name, what a difference may be more than that.

    Raises:
        OracleError: names what differs, and by how much; or what is missing.
    """
    if found.keys() != reference.keys():
        raise OracleError(f"there are {sorted(found)}, and should be {sorted(reference)}")
    worst = 0.0
    for name, expected in reference.items():
        if found[name].shape != expected.shape:
            raise OracleError(f"{name}: is {found[name].shape}, and should be {expected.shape}")
        if not expected.size:
            continue
        scale = float(np.abs(expected).max())
        difference = float(np.abs(found[name] - expected).max())
        relative = difference / scale if scale else difference
        allowed = tolerance * scale + (0.0 if rounding is None else rounding[name])
        if not difference <= allowed:  # NaN too
            raise OracleError(
                f"{name}: differs from the reference by {relative:.1e} of its largest number, "
                f"{tolerance:.0e} is allowed"
            )
        worst = max(worst, relative)
    return worst


def count_crossing(records: Sequence[Record], routing: Routing) -> int:
    """Pairs that were computed on another rank than their token's."""
    sources = routing.sources
    return sum(int((sources[each.token] != rank).sum()) for rank, each in enumerate(records))


def _repeated(found: np.ndarray) -> np.ndarray:
    values, times = np.unique(found, return_counts=True)
    return values[times > 1]


def _tell(pair: int, E: int, found: np.ndarray, place: np.ndarray) -> str:
    """The pair in words, and where it was seen."""
    ranks = sorted(set(place[found == pair].tolist()))
    where = f" on rank {', '.join(map(str, ranks))}" if ranks else ""
    return f"token {pair // E}, expert {pair % E}{where}"
