"""Which ranks share tokens where a token may go to any replica of its expert.

Letters: D replicas of every expert, P ranks of one expert-parallel group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llep.lending.groups import gather_objects, ranks_of

_FLAG = "--moe-llep-replicas expert-dp"

Ranks = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class GroupRanks:
    """The ranks of the groups in which one rank shares experts, each in ascending order."""

    ep: Ranks
    tp_ep: Ranks
    expt_dp: Ranks


def read_ranks(groups: ProcessGroupCollection) -> GroupRanks:
    """Of a layer's groups."""
    return GroupRanks(
        ep=ranks_of(groups.ep), tp_ep=ranks_of(groups.tp_ep), expt_dp=ranks_of(groups.expt_dp)
    )


def join_all(mine: Sequence[GroupRanks]) -> list[GroupRanks]:
    """Join expert-parallel groups over the replicas of their experts.

    All ranks of the job call it. All look at what all of them gather, so if the groups of any
    rank do not fit, the same error is raised on every rank.

    Args:
        mine: of this rank's MoE layers; nothing where it has none.

    Returns:
        `ep` and `tp_ep` joined over `expt_dp`: rank (d, p) of D * P has number d * P + p.

    Raises:
        ValueError: expert data parallelism is 1, or the ranks are in another order.
    """
    everyone = gather_objects(tuple(mine))
    joined = {each: _join(each, everyone) for rank in everyone for each in rank}
    return [joined[each] for each in mine]


def _join(mine: GroupRanks, everyone: Sequence[Sequence[GroupRanks]]) -> GroupRanks:
    if len(mine.expt_dp) == 1:
        raise ValueError(
            f"{_FLAG}: expert data parallelism is 1 here, no expert has a second replica; use more "
            "ranks or a smaller --expert-model-parallel-size, or leave the flag out"
        )
    rows = [
        each for rank in mine.expt_dp for each in everyone[rank] if each.expt_dp == mine.expt_dp
    ]
    return GroupRanks(
        ep=_append([row.ep for row in rows]),
        tp_ep=_append([row.tp_ep for row in rows]),
        expt_dp=mine.expt_dp,
    )


def _append(rows: list[Ranks]) -> Ranks:
    ranks = tuple(rank for row in rows for rank in row)
    if list(ranks) != sorted(set(ranks)):  # a torch group has its ranks in ascending order
        raise ValueError(
            f"{_FLAG}: ranks of the expert-parallel groups {rows} are not in ascending order; put "
            "expert data parallelism outside expert parallelism, as Megatron does, or leave the "
            "flag out"
        )
    return ranks
