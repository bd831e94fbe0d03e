"""Planner `lp`: the least possible load of the most loaded rank, for given holders of the experts.

Shape letters: P ranks, E experts, C classes of experts that the same ranks hold.

MicroMoE's linear program: minimise m subject to sum_g x[e, g] = load[e] over the ranks g that hold
e, sum_e x[e, g] <= m for every rank, x >= 0. `solve_lp` gives it to a solver. `lp_quota` solves it
in whole tokens: x is a flow from experts to ranks, integral where all capacities are, so the least
whole m is the optimum of the program, rounded up.
"""

import numpy as np


def solve_lp(loads: np.ndarray, holders: np.ndarray) -> float:
    """Solve the linear program with SciPy's HiGHS; the least possible largest load of a rank.

    Args:
        loads: integers [E], tokens of each expert.
        holders: bool [E, P], the ranks that hold each expert.

    Raises:
        ValueError: shapes do not fit, or an expert with tokens has no holder.
        ImportError: SciPy is missing; the message says how to get it.
    """
    try:
        from scipy.optimize import linprog
        from scipy.sparse import coo_array
    except ImportError as error:
        raise ImportError("solve_lp needs SciPy: pip install 'megatron-llep[dev]'") from error
    _check(loads, holders)
    E, P = holders.shape
    expert, rank = np.nonzero(holders)
    n = len(expert)
    edge = np.arange(n)
    # Variables: x of each (expert, holder), then m.
    sums = coo_array((np.ones(n), (expert, edge)), shape=(E, n + 1))
    below_m = coo_array(
        (
            np.concatenate((np.ones(n), -np.ones(P))),
            (np.concatenate((rank, np.arange(P))), np.concatenate((edge, np.full(P, n)))),
        ),
        shape=(P, n + 1),
    )
    solution = linprog(
        np.arange(n + 1) == n,
        A_ub=below_m.tocsr(),
        b_ub=np.zeros(P),
        A_eq=sums.tocsr(),
        b_eq=loads,
        method="highs",
    )
    assert solution.success, solution.message
    return float(solution.fun)


def lp_quota(loads: np.ndarray, holders: np.ndarray) -> np.ndarray:
    """Spread every expert's tokens over its holders so that the largest load is least.

    A parametric maximum flow: tokens are pushed from ranks above a lower bound to ranks below it,
    along shortest paths of shared experts. Ranks that no path leads out of must carry all they
    have, so their mean load is the next, higher bound; it is reached at the optimum.

    Args:
        loads: integers [E], tokens of each expert.
        holders: bool [E, P], the ranks that hold each expert.

    Returns:
        int64 [E, P], tokens of each expert on each rank. The largest load of a rank is
        `solve_lp`'s optimum, rounded up.

    Raises:
        ValueError: shapes do not fit, or an expert with tokens has no holder.
    """
    _check(loads, holders)
    loads = loads.astype(np.int64, copy=False)
    classes, class_of = _classify(holders)
    class_loads = np.zeros(len(classes), dtype=np.int64)
    np.add.at(class_loads, class_of, loads)
    flow = _fill(class_loads, classes)
    _level(flow, classes)
    return _divide(flow, loads, class_of)


def _check(loads: np.ndarray, holders: np.ndarray) -> None:
    if holders.ndim != 2 or 0 in holders.shape or loads.shape != holders.shape[:1]:
        raise ValueError(
            f"loads {list(loads.shape)} and holders {list(holders.shape)} must be [E] and [E, P]"
        )
    homeless = (loads > 0) & ~holders.any(axis=1)
    if homeless.any():
        expert = int(np.argmax(homeless))
        raise ValueError(f"expert {expert} has {loads[expert]} tokens and no rank that holds it")


def _classify(holders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put experts with the same holders together: holders of each class [C, P], class_of [E]."""
    numbers: dict[bytes, int] = {}
    packed = np.packbits(holders, axis=1)
    class_of = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in packed])
    _, first = np.unique(class_of, return_index=True)
    return holders[first], class_of


def _fill(class_loads: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Pour the classes one by one over their holders, the emptiest first: int64 [C, P].

    Classes with few holders come first, then large ones. Where no two classes share a rank this
    is the optimum already.
    """
    flow = np.zeros(classes.shape, dtype=np.int64)
    load = [0] * classes.shape[1]
    holders_of = [np.flatnonzero(row).tolist() for row in classes]
    amounts = class_loads.tolist()
    order = sorted(range(len(amounts)), key=lambda c: (len(holders_of[c]), -amounts[c]))
    for c in order:
        if not amounts[c]:
            continue
        ranks = sorted(holders_of[c], key=load.__getitem__)
        # The k emptiest holders end at one level, not above the next one's load.
        volume = amounts[c]
        k = 0
        while k < len(ranks) and (k == 0 or volume > k * load[ranks[k]]):
            volume += load[ranks[k]]
            k += 1
        level, extra = divmod(volume, k)
        for i, rank in enumerate(ranks[:k]):
            poured = level + (i < extra)
            flow[c, rank] = poured - load[rank]
            load[rank] = poured
    return flow


def _level(flow: np.ndarray, classes: np.ndarray) -> None:
    """Move tokens between holders, in place, until the largest load is the least possible."""
    P = flow.shape[1]
    load = flow.sum(axis=0)
    bound = -(-int(load.sum()) // P)  # no solution has less on its most loaded rank
    while (load > bound).any():
        rank_distance, class_distance = _measure(flow, classes, load < bound)
        stuck = rank_distance == P
        if (load[stuck] > bound).any():
            # All holders of all that these ranks have are among them.
            bound = -(-int(load[stuck].sum()) // int(stuck.sum()))
            continue
        _push(flow, classes, load, bound, rank_distance, class_distance)


def _measure(
    flow: np.ndarray, classes: np.ndarray, has_room: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Count the moves from each rank [P] and class [C] to a rank with room; P where none leads.

    A class is as near as its nearest holder; a rank one more than the nearest class it has tokens
    of.
    """
    C, P = flow.shape
    rank_distance = np.where(has_room, 0, P)
    class_distance = np.full(C, P)
    has_tokens = flow > 0
    frontier = has_room
    for distance in range(P):
        near = classes[:, frontier].any(axis=1) & (class_distance == P)
        class_distance[near] = distance
        frontier = has_tokens[near].any(axis=0) & (rank_distance == P)
        if not frontier.any():
            break
        rank_distance[frontier] = distance + 1
    return rank_distance, class_distance


def _push(
    flow: np.ndarray,
    classes: np.ndarray,
    load: np.ndarray,
    bound: int,
    rank_distance: np.ndarray,
    class_distance: np.ndarray,
) -> None:
    """Let every rank above the bound push once, in place, the farthest first.

    A rank in between takes more than it has room for and passes it on in its turn. Distances never
    shrink, and that of a rank which could not push all it had grows: so the pushes come to an end.
    """
    P = len(load)
    order = np.argsort(-rank_distance, kind="stable")
    for rank in order[rank_distance[order] < P].tolist():
        excess, distance = int(load[rank]) - bound, int(rank_distance[rank])
        if distance == 0:
            break
        if excess <= 0:
            continue
        nearer = (flow[:, rank] > 0) & (class_distance == distance - 1)
        for c in np.flatnonzero(nearer).tolist():
            targets = np.flatnonzero(classes[c] & (rank_distance == distance - 1))
            for target in targets[np.argsort(load[targets], kind="stable")].tolist():
                moved = min(excess, int(flow[c, rank]))
                if distance == 1:
                    moved = min(moved, bound - int(load[target]))
                flow[c, rank] -= moved
                flow[c, target] += moved
                load[rank] -= moved
                load[target] += moved
                excess -= moved
                if not excess or not flow[c, rank]:
                    break
            if not excess:
                break


def _divide(flow: np.ndarray, loads: np.ndarray, class_of: np.ndarray) -> np.ndarray:
    """Divide each class's tokens [C, P] among its experts, in order: int64 [E, P].

    Only experts at the border of two ranks are on both.
    """
    by_class = np.argsort(class_of, kind="stable")
    # Experts and ranks of one class, laid end to end, cut the same line of tokens.
    end = np.empty_like(loads)
    end[by_class] = np.cumsum(loads[by_class])
    start = end - loads
    flow_end = np.cumsum(flow).reshape(flow.shape)[class_of]
    # Classes are laid out in order of their number in both.
    inside = np.clip(flow_end, start[:, None], end[:, None])
    return np.diff(inside, axis=1, prepend=start[:, None])
