"""Process groups of LLEP's own: made by all ranks of the job, in one order, and once.

Torch numbers the groups that a process makes. Were some made by their members alone, the ranks
would count apart, and the next ordinary group would wait for ever. So ranks that need none of them
take part as well, as they do in Megatron.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

LENDING = "LLEP_LENDING"
REPLICAS = "LLEP_REPLICAS"

Key = tuple[str, tuple[int, ...]]
"""What a group is for, and its ranks in ascending order."""


def make_groups(wanted: Mapping[Key, dist.ProcessGroup]) -> dict[Key, dist.ProcessGroup]:
    """The groups that this rank needs; those that do not exist are made.

    All ranks of the job call it, also those that need none, and all decide from what they gather.
    Each new group for lending has exchanged something: what its communicator takes is taken here,
    and not at the first loan, when memory may be full.

    Args:
        wanted: with each group another, whose backend, time-out and options it gets.

    Returns:
        The groups, by the same keys.

    Raises:
        ValueError: on all ranks; a rank of a group does not want it.
    """
    groups = {key: _find(key, like) for key, like in wanted.items()}
    exists = gather_objects({key: group is not None for key, group in groups.items()})
    keys = sorted(set().union(*exists))
    for key in keys:
        _check_members(key, absent=[rank for rank in key[1] if key not in exists[rank]])
    missing = [key for key in keys if not all(exists[rank][key] for rank in key[1])]
    made = {key: _make(key, wanted.get(key)) for key in missing}
    groups |= {key: group for key, group in made.items() if key in wanted}
    for key in missing:
        if key in wanted and key[0] == LENDING:
            _warm_up(groups[key])
    return groups


def gather_objects(mine: Any) -> list[Any]:
    """What each rank of the job gives, by rank; all of them call it."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def ranks_of(group: dist.ProcessGroup) -> tuple[int, ...]:
    """The group's ranks, as numbered in the whole job."""
    return tuple(dist.get_process_group_ranks(group))


def copy_options(options: Any) -> Any:
    """NCCL's options for another group: time-out, priority and configuration.

    Not the rest, which is about the one group that has them: its name, its ranks, what it was split
    from.

    Args:
        options: of a group's backend.

    Returns:
        New options of the same type; None for a backend that has no such options.
    """
    if not hasattr(options, "is_high_priority_stream"):
        return None
    copied = type(options)()
    copied.is_high_priority_stream = options.is_high_priority_stream
    copied._timeout = options._timeout
    if hasattr(options, "config"):  # not in a torch built with an old NCCL
        copied.config = options.config
    return copied


def _check_members(key: Key, absent: list[int]) -> None:
    if absent:
        raise ValueError(
            f"--moe-llep: of the ranks {list(key[1])}, which share experts, {absent} have no MoE "
            "layer here; call convert_model, or with_llep for each model chunk, on all ranks alike"
        )


def _find(key: Key, like: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """The newest group of this purpose, ranks and time-out, of those made beside Megatron's own.

    Megatron's list holds them, and it forgets them where it forgets its own groups.
    """
    purpose, ranks = key
    for group in reversed(parallel_state._global_process_group_list or []):
        if (
            group is not None
            and group.group_desc == purpose
            and _exists(group)
            and ranks_of(group) == ranks
            and _get_timeout(group) == _get_timeout(like)
        ):
            return group
    return None


def _exists(group: dist.ProcessGroup) -> bool:
    """Whether torch still knows it: the list keeps destroyed ones."""
    try:
        dist.get_backend(group)
    except ValueError:
        return False
    return True


def _make(key: Key, like: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Make one; `like` is None on ranks outside it.

    Through Megatron, so that a later change of all time-outs reaches it.
    """
    purpose, ranks = key
    settings: dict[str, Any] = {}
    if like is not None:
        backend = dist.get_backend(like)
        settings = {"backend": backend, "timeout": _get_timeout(like)}
        if ":" not in backend:  # else of several backends, which take different options
            settings["pg_options"] = copy_options(_get_options(like))
    return parallel_state.create_group(list(ranks), group_desc=purpose, **settings)


def _warm_up(group: dist.ProcessGroup) -> None:
    """Send one number from each rank to each: all its connections are made."""
    on_gpu = torch.cuda.is_available() and dist.get_backend(group) != "gloo"
    ones = torch.ones(group.size(), device="cuda" if on_gpu else "cpu")
    dist.all_to_all_single(torch.empty_like(ones), ones, group=group)


# Torch has no public way to read these; the backend of its tests has none.
def _get_options(group: dist.ProcessGroup) -> Any:
    return group._get_backend(group._device_types[0]).options


def _get_timeout(group: dist.ProcessGroup) -> Any:
    return getattr(_get_options(group), "_timeout", None)
