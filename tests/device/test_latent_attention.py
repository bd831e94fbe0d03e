"""Multi-latent attention on a CPU is the one of the paper: outputs, gradients, packs.

Letters: s tokens, b sequences, h hidden size.
"""

import itertools
import zlib

import pytest
import torch
import torch.distributed as dist
from latent_reference import Shape, attend
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module

from megatron_llep.integration.local_spec import build_local_block_spec
from support.comparison import get_relative_difference
from support.layout import Layout, use_layout
from support.ranks import run_ranks
from support.training import Run, make_config
from support.versions import needs_megatron

pytestmark = needs_megatron((0, 19), "latent attention without Transformer Engine")

S, B, H = 12, 2, 32

SHAPES = {
    "as DeepSeek": Shape(n=4, q=12, r=8, d=8, p=4, v=8, yarn=40.0, mscale_all_dim=1.0),
    "wide values": Shape(n=2, q=6, r=10, d=4, p=2, v=14),
    "narrow values": Shape(n=6, q=10, r=6, d=10, p=8, v=2, yarn=4.0, mscale=0.7),
    "no query rank": Shape(n=2, q=None, r=8, d=6, p=6, v=5, base=500.0),
    "all rotary": Shape(n=2, q=4, r=4, d=2, p=16, v=3, yarn=8.0, base=100.0),
}
ODD = {
    "one head": Shape(n=1, q=7, r=9, d=5, p=2, v=7),
    "odd heads": Shape(n=3, q=None, r=5, d=3, p=4, v=9, yarn=40.0),
}
"""Not to be cut in two."""


def make_attention(shape, layout, **changes):
    settings = {
        "multi_latent_attention": True,
        "hidden_size": H,
        "num_attention_heads": shape.n,
        "kv_channels": 16,
        "q_lora_rank": shape.q,
        "kv_lora_rank": shape.r,
        "qk_head_dim": shape.d,
        "qk_pos_emb_head_dim": shape.p,
        "v_head_dim": shape.v,
        "rope_type": "yarn" if shape.yarn else "rope",
        "rotary_base": shape.base,
        "rotary_scaling_factor": shape.yarn or 1.0,
        "mscale": shape.mscale,
        "mscale_all_dim": shape.mscale_all_dim,
        "qk_layernorm": True,
        "layernorm_epsilon": shape.eps,
    }
    config = make_config(Run(layout=layout, config=settings | changes))
    spec = build_local_block_spec(config).layer_specs[0].submodules.self_attention
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return build_module(spec, config=config, layer_number=1, pg_collection=groups)


def fill(attention, layout, rank):
    """The whole weights, by names without ends."""
    whole = {}
    for name, parameter in attention.named_parameters():
        is_cut = getattr(parameter, "tensor_model_parallel", False)
        size = list(parameter.shape)
        if is_cut:
            size[parameter.partition_dim] *= layout.tp
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        weight = torch.randn(size, generator=generator) * 0.3 + (len(size) == 1)
        mine = weight.chunk(layout.tp, parameter.partition_dim)[rank] if is_cut else weight
        with torch.no_grad():
            parameter.copy_(mine)
        whole[short_name(name)] = weight.requires_grad_()
    return whole


def short_name(name):
    if "norm" in name:
        return "kv_norm" if name.startswith("kv") else "q_norm"
    return name.removesuffix(".weight")


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(what, actual, expected):
    difference = get_relative_difference(actual, expected)
    assert difference < 2e-5, f"{what} differs by {difference:.1e}"


def compare(shape, layout, rank, **changes):
    """Output and gradients of this rank's part against those of the whole reference."""
    attention = make_attention(shape, layout, **changes)
    weights = fill(attention, layout, rank)
    x = draw(S, B, H, seed=1).requires_grad_()
    weight = draw(S, B, H, seed=2)
    expected = attend(x, weights, shape)
    (expected * weight).sum().backward()

    mine = x.detach().chunk(layout.tp)[rank].clone().requires_grad_()
    output, _ = attention(mine, None)
    assert_close("output", output, expected.chunk(layout.tp)[rank])
    (output * weight.chunk(layout.tp)[rank]).sum().backward()
    assert_close("gradient of the input", mine.grad, x.grad.chunk(layout.tp)[rank])
    seen = set()
    for name, parameter in attention.named_parameters():
        whole = weights[short_name(name)].grad
        if getattr(parameter, "tensor_model_parallel", False):
            whole = whole.chunk(layout.tp, parameter.partition_dim)[rank]
        else:
            # As Megatron does after backward, for parameters so marked.
            assert parameter.sequence_parallel == (layout.tp > 1)
            dist.all_reduce(parameter.grad)
        assert_close(f"gradient of {name}", parameter.grad, whole)
        seen.add(short_name(name))
    assert seen == set(weights)


def compare_all_shapes(rank, layout, shapes):
    recomputed = {"recompute_granularity": "selective"}
    with use_layout(layout):
        for name, shape in shapes.items():
            for what, changes in {
                "": {},
                "without norms": {"qk_layernorm": False},
                "recomputed": recomputed | {"recompute_modules": ["core_attn", "mla_up_proj"]},
            }.items():
                try:
                    compare(shape, layout, rank, **changes)
                except BaseException as error:
                    error.add_note(f"{name} {what}")
                    raise


def test_a_rank_computes_the_reference():
    run_ranks(lambda rank, size: compare_all_shapes(rank, Layout(), SHAPES | ODD), 1)


def test_two_tensor_parallel_ranks_compute_the_reference():
    layout = Layout(tp=2, ep=2, etp=1)
    run_ranks(lambda rank, size: compare_all_shapes(rank, layout, SHAPES), 2)


LENGTHS = (1, 7, 3, 20, 2)


def test_each_segment_of_a_pack_is_as_if_alone():
    def work(rank, size):
        with use_layout(Layout()):
            for shape in (SHAPES | ODD).values():
                attention = make_attention(shape, Layout())
                fill(attention, Layout(), 0)
                x = draw(sum(LENGTHS), 1, H, seed=1)
                starts = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
                pack = PackedSeqParams(
                    qkv_format="thd",
                    cu_seqlens_q=starts,
                    cu_seqlens_kv=starts,
                    max_seqlen_q=max(LENGTHS),
                    max_seqlen_kv=max(LENGTHS),
                )
                packed, _ = attention(x, None, packed_seq_params=pack)
                alone = [
                    attention(x[start:end], None)[0]
                    for start, end in itertools.pairwise(starts.tolist())
                ]
                torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)

    run_ranks(work, 1)


REFUSED = {
    "keys": (
        {"kv_lora_rank": 7, "qk_pos_emb_head_dim": 4},
        r"--tensor-model-parallel-size 2: .*--kv-lora-rank 7 .*together 11",
    ),
    "queries": ({"q_lora_rank": 9}, r"--tensor-model-parallel-size 2: .*--q-lora-rank 9"),
    "rotary": ({"qk_pos_emb_head_dim": 3}, r"--qk-pos-emb-head-dim 3: .*even"),
    "norm": ({"qk_l2_norm": True}, r"--qk-l2-norm: .*--qk-layernorm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_local_layers_cannot_compute_is_refused(name):
    changes, message = REFUSED[name]
    small = {"multi_latent_attention": True, "kv_lora_rank": 8, "qk_pos_emb_head_dim": 4}
    run = Run(layout=Layout(tp=2, ep=2, etp=1), config=small | {"q_lora_rank": 8} | changes)
    with pytest.raises(ValueError, match=message):
        build_local_block_spec(make_config(run))


def test_checkpoints_hold_the_norm_of_queries_once_and_their_projection_in_parts():
    shape, layout = SHAPES["no query rank"], Layout(tp=2, ep=2, etp=1)

    def work(rank, size):
        with use_layout(layout):
            shards = make_attention(shape, layout).sharded_state_dict(metadata=METADATA)
            norm = shards["linear_q_proj.layer_norm_weight"]
            weight = shards["linear_q_proj.weight"]
            return norm.global_shape, norm.global_offset, weight.global_shape, weight.global_offset

    wide = shape.n * (shape.d + shape.p)
    for rank, (norm, norm_at, weight, weight_at) in enumerate(run_ranks(work, 2)):
        assert (norm, norm_at) == ((H,), (0,))
        assert (weight, weight_at) == ((wide, H), (rank * wide // 2, 0))


METADATA = {"dp_cp_group": None}
