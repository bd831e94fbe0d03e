"""Attention over a pack is, for each of its segments, attention over that segment alone.

Letters: T tokens of the pack, N heads, G of keys and values, D head dimension.
"""

import itertools

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_llep.integration.local_attention import PackedDotProductAttention
from support.layout import Layout, use_layout
from support.ranks import run_ranks
from support.training import Run, make_config

N, G, D = 4, 2, 8
LENGTHS = (1, 17, 3, 64, 65, 2, 9, 30, 1)
KINDS = {
    "plain": {},
    "window": {"window_size": (5, 0)},
    "sinks": {"softmax_type": "learnable"},
    "window and sinks": {"window_size": (5, 0), "softmax_type": "learnable"},
}


def make_attention(kind, settings):
    config = make_config(
        Run(config={"num_attention_heads": N, "num_query_groups": G, "kv_channels": D, **settings})
    )
    torch.manual_seed(1)
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
    return kind(config, 1, AttnMaskType.causal, "self", pg_collection=groups)


def compare(settings):
    packed = make_attention(PackedDotProductAttention, settings)
    alone = make_attention(DotProductAttention, settings)
    T = sum(LENGTHS)
    starts = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    pack = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)
    tensors = [torch.randn(T, heads, D, requires_grad=True) for heads in (N, G, G)]
    weight = torch.randn(T, N * D)

    def differentiate(output):
        inputs = [*tensors, *packed.parameters(), *alone.parameters()]
        grads = torch.autograd.grad((output * weight).sum(), inputs, allow_unused=True)
        return [output, *(grad for grad in grads if grad is not None)]

    together = differentiate(packed(*tensors, None, packed_seq_params=pack))
    parts = [
        alone(*(each[start:end, None] for each in tensors), None)[:, 0]
        for start, end in itertools.pairwise(starts.tolist())
    ]
    one_by_one = differentiate(torch.cat(parts))
    for mine, expected in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_each_segment_is_as_if_alone():
    def work(rank, size):
        with use_layout(Layout()):
            for kind, settings in KINDS.items():
                try:
                    compare(settings)
                except BaseException as error:
                    error.add_note(f"kind: {kind}")
                    raise

    run_ranks(work, 1)


def test_without_a_pack_it_is_megatrons():
    def work(rank, size):
        with use_layout(Layout()):
            mine = make_attention(PackedDotProductAttention, {})
            plain = make_attention(DotProductAttention, {})
            tensors = [torch.randn(6, 2, heads, D) for heads in (N, G, G)]
            assert torch.equal(mine(*tensors, None), plain(*tensors, None))

    run_ranks(work, 1)


@pytest.mark.parametrize("length", [1, 5, 200])
def test_a_pack_of_one_is_the_sequence(length):
    def work(rank, size):
        with use_layout(Layout()):
            attention = make_attention(PackedDotProductAttention, {})
            tensors = [torch.randn(length, heads, D) for heads in (N, G, G)]
            starts = torch.tensor([0, length, length], dtype=torch.int32)
            pack = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)
            alone = attention(*(each[:, None] for each in tensors), None)[:, 0]
            packed = attention(*tensors, None, packed_seq_params=pack)
            torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-6)

    run_ranks(work, 1)
