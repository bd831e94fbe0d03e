"""Packs side by side, as LLEP does it for a Megatron that does not."""

import torch

from megatron_llep.compat.packs import flatten_packs
from megatron_llep.compat.training import flatten_packs as flatten_here


def make_batch():
    """Two packs of 6 tokens: segments of 2, 4 and of 6; a middle stage has no labels."""
    return {
        "tokens": torch.arange(12).view(2, 6),
        "labels": None,
        "cu_seqlens": torch.tensor([[0, 2, 6], [0, 6, 6]], dtype=torch.int32),
        "max_seqlen": torch.tensor([4, 6], dtype=torch.int32),
    }


def test_two_packs_become_one():
    flat = flatten_packs(make_batch())
    assert flat["tokens"].tolist() == [list(range(12))]
    assert flat["cu_seqlens"].tolist() == [[0, 2, 6, 12]]
    assert flat["max_seqlen"].tolist() == [6]
    assert flat["labels"] is None


def test_it_is_what_this_megatron_does():
    ours, megatrons = flatten_packs(make_batch()), flatten_here(make_batch())
    for name in ("tokens", "cu_seqlens", "max_seqlen"):
        assert ours[name].dtype == megatrons[name].dtype
        assert torch.equal(ours[name], megatrons[name])
