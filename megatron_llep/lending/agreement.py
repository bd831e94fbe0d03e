"""Ranks agree that their experts can be lent to each other, before any of them is.

What an expert is made of may change at any time, as adapters are put around its linears, and may
differ from layer to layer. It must be the same on all ranks that share tokens. A digest of it goes
out with the counts: so nothing more is exchanged unless something is wrong, and then by all ranks.
"""

import torch.distributed as dist

from megatron_llep.placement.rank_note import Notes


def may_lend(notes: Notes, tp_size: int) -> bool:
    """Whether no rank refuses, and all have experts of the same form: as `check_experts` checks."""
    forms = notes.experts.reshape(-1, tp_size)
    return not notes.refuses.any() and bool((forms == forms[0]).all())


def check_experts(
    notes: Notes, experts: str, *, place: str, tp_size: int, group: dist.ProcessGroup
) -> None:
    """Check that no rank refuses, and that all have experts of the same form.

    Args:
        notes: of all R ranks of the group.
        experts: what this rank's are made of, line by line, or why it refuses them.
        place: which layer this is, in words.
        tp_size: ranks of expert tensor parallelism, which follow each other in the group. Each has
            its part of an expert, to be compared with the same part elsewhere.
        group: these ranks.

    Raises:
        ValueError: on all ranks; says who refuses and why, or what differs.
    """
    if may_lend(notes, tp_size):
        return
    forms = notes.experts.reshape(-1, tp_size)
    refuses = notes.refuses != 0
    numbers = dist.get_process_group_ranks(group)
    said = [""] * len(numbers)
    dist.all_gather_object(said, experts, group=group)
    if refuses.any():
        first, *others = (each for each, refused in zip(numbers, refuses, strict=True) if refused)
        also = f"; so do ranks {others}" if others else ""
        raise ValueError(f"{said[numbers.index(first)]}: rank {first} refuses it{also}")
    one, other = _find_unlike(forms.tolist(), tp_size)
    ours, theirs = _find_difference(said[one], said[other])
    raise ValueError(
        f"--moe-llep: in {place}, experts are made of other parts on rank {numbers[one]} than on "
        f"rank {numbers[other]} ({ours}; {theirs}), so neither can compute the other's; give all "
        "ranks the same adapters, of the same rank and scale, around the same linears"
    )


def _find_unlike(forms: list[list[int]], tp_size: int) -> tuple[int, int]:
    """Two ranks of the group that should have the same form and do not."""
    return next(
        (part, row * tp_size + part)
        for row, digests in enumerate(forms)
        for part, digest in enumerate(digests)
        if digest != forms[0][part]
    )


def _find_difference(one: str, other: str) -> tuple[str, str]:
    """The first line in which two descriptions differ, of each."""
    lines = one.splitlines(), other.splitlines()
    length = max(map(len, lines))
    padded = [each + ["nothing more"] * (length - len(each)) for each in lines]
    return next((a, b) for a, b in zip(*padded, strict=True) if a != b)
