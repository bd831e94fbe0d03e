"""What experts were given: read off the tokens themselves, and off the weights they met.

A token is known by its own numbers, an expert by those of its weights. So what is recorded does not
depend on what a method or its dispatcher says.

Letters: N tokens of all ranks, n rows that this rank's experts were given, H hidden size.
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.imbalance.data import StepData
from benchmarks.imbalance.methods import Subject
from benchmarks.imbalance.oracle import OracleError, Record

Seen = tuple[torch.Tensor, torch.Tensor, np.ndarray]
"""Rows [n, H], weights of their pairs [n], and experts [n]."""


def learn_experts(subject: Subject) -> dict[int, int]:
    """Which expert has which numbers, from the ranks where experts are at home or placed.

    Raises:
        OracleError: replicas of an expert have become different, or two experts the same.
    """
    own = subject.expert_of_slot(dist.get_rank())
    marks = [
        (int(_mark(module.linear_fc1.weight[:1])[0]), int(expert))
        for module, expert in zip(
            subject.layer.experts.local_experts, own.tolist(), strict=False
        )  # natives come first
    ]
    all_marks: list[list[tuple[int, int]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(all_marks, marks)
    found = {pair for of_rank in all_marks for pair in of_rank}
    experts = dict(found)
    if len(experts) != subject.sizes.num_experts or len(found) != len(experts):
        raise OracleError(
            f"{len(found)} different sets of weights for {subject.sizes.num_experts} experts: "
            "replicas are not the same any more"
        )
    return experts


@contextlib.contextmanager
def watch_experts(subject: Subject, experts: dict[int, int]) -> Iterator[list[Seen]]:
    """While it is open, note what each expert's module is given, and whose weights it has then.

    LLEP computes a foreign expert in the module of a native one, with other weights.
    """
    seen: list[Seen] = []

    def note(module: torch.nn.Module, given: Sequence[torch.Tensor]) -> None:
        rows, probs = given
        mark = int(_mark(module.linear_fc1.weight[:1])[0])
        which = np.full(len(rows), experts.get(mark, -1))
        seen.append((rows.detach().clone(), probs.detach().clone(), which))

    hooks = [
        module.register_forward_pre_hook(note) for module in subject.layer.experts.local_experts
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def gather_records(seen: Sequence[Seen], data: StepData) -> list[Record]:
    """What all ranks have seen, in their order; a row that is no token of the step is -1."""
    rows, weights, experts = zip(*seen, strict=True)
    own = Record(
        token=_find_tokens(torch.cat(rows), data.hidden),
        expert=np.concatenate(experts),
        weight=torch.cat(weights).double().cpu().numpy(),
    )
    records = [own] * dist.get_world_size()
    dist.all_gather_object(records, own)
    return records


def _find_tokens(rows: torch.Tensor, hidden: torch.Tensor) -> np.ndarray:
    """Which of the tokens [N, H] each row [n, H] is, to the last bit: int64 [n]."""
    marks = _mark(hidden)
    order = np.argsort(marks)
    if (np.diff(marks[order]) == 0).any():
        raise OracleError("two tokens look the same: give another --seed")
    at = np.searchsorted(marks[order], _mark(rows)).clip(max=len(order) - 1)
    token = order[at]
    same = (hidden[torch.from_numpy(token).to(hidden.device)] == rows).all(dim=1)
    return np.where(same.cpu().numpy(), token, -1)


def _mark(rows: torch.Tensor) -> np.ndarray:
    """The bits of the first two numbers of each row: int64 [n]."""
    first = rows.detach()[:, :2].to(torch.float32).cpu().contiguous()
    return first.numpy().view(np.int64)[:, 0]
