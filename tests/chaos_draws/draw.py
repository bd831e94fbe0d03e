"""One random case, from a seed and a number alone.

Letters: P ranks of an expert-parallel group, M experts native to a rank, E = P * M, K experts per
token, T tokens of a rank.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_llep.config import EXPERT_GEMMS, FOREIGN_WEIGHTS, GRAD_DTYPES, LEND_TO, LLEPConfig
from megatron_llep.planner import ORDERS
from support.layout import Layout

Dtype = Literal["float32", "float64", "bfloat16"]

LAYOUTS = {
    Layout(ep=2): 3,
    Layout(tp=2, ep=2, etp=1): 3,
    Layout(ep=4): 1,
    Layout(ep=2, dp=4): 1,
    Layout(tp=2, ep=2): 1,
    Layout(tp=2, ep=2, etp=1, dp=2): 1,
    Layout(tp=2, ep=4, etp=1): 1,
    Layout(ep=2, etp=2): 1,
}
"""EP 2, EP 4, EP 2 x expert-DP 2, each also with TP; ETP with and without TP. With each how often:
two ranks cost a third of what four do."""

MOST_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A case; `number` of its seed."""

    seed: int
    number: int
    layout: Layout
    llep: LLEPConfig
    dtype: Dtype
    model: Mapping[str, Any]
    """Fields of TransformerConfig: sizes, router, recompute."""
    ddp: Mapping[str, Any]
    """Fields of DistributedDataParallelConfig."""
    steps: int
    """Each from zeroed gradients to reduced ones. Megatron overlaps from the second one on."""
    tokens: tuple[tuple[tuple[int, ...], ...], ...]
    """T of every rank, in every micro-batch of every step: [steps][micro-batches][ranks]."""
    skew: float
    """Popularity of experts falls as 1 / place ** skew."""
    same_skew: bool
    """Whether an expert that is popular on one rank is so on all."""
    in_flight: bool
    """Whether all forwards of a step come before its backwards."""
    delay_share: float
    """Of collectives, before which a rank sleeps."""
    delay_seconds: float
    """At most so long."""
    late_rank: int | None
    """Sleeps before each layer, too."""

    @property
    def name(self) -> str:
        """For messages."""
        return f"draw {self.number} of seed {self.seed}"

    @property
    def command(self) -> str:
        """What repeats this draw alone."""
        return f"make chaos DRAWS=1 SEED={self.seed} FIRST={self.number}"


def make_draw(seed: int, number: int) -> Draw:
    """Make the case with this number; the same each time."""
    draw = random.Random(f"{seed} {number}")
    layout = draw.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
    M = draw.randint(1, 4)
    E = layout.ep * M
    dtype: Dtype = draw.choices(("float32", "float64", "bfloat16"), (10, 8, 2))[0]
    steps = draw.choice((1, 1, 1, 2))
    micro_batches = draw.choice((1, 2))
    tokens = tuple(
        tuple(draw_tokens(draw, layout.world_size) for _ in range(micro_batches))
        for _ in range(steps)
    )
    return Draw(
        seed=seed,
        number=number,
        layout=layout,
        llep=draw_llep(draw, layout, M),
        dtype=dtype,
        model=draw_model(draw, layout, E),
        ddp=draw_ddp(draw, dtype),
        steps=steps,
        tokens=tokens,
        skew=draw.choice((0.0, draw.uniform(0, 3), draw.uniform(0, 3), 8.0)),
        same_skew=draw.random() < 0.7,
        in_flight=draw.random() < 0.5,
        delay_share=draw.choice((0.0, 0.1, 0.3)),
        delay_seconds=draw.choice((0.001, 0.005)),
        late_rank=draw.choice((None, draw.randrange(layout.world_size))),
    )


def draw_tokens(draw: random.Random, ranks: int) -> tuple[int, ...]:
    """Each rank's tokens: the same, any, or none on some; at least one in all."""
    kind = draw.choice(("same", "ragged", "none"))
    if kind == "same":
        return (draw.randint(8, MOST_TOKENS),) * ranks
    counts = [draw.randint(1, MOST_TOKENS) for _ in range(ranks)]
    if kind == "none":
        for rank in draw.sample(range(ranks), draw.randint(1, ranks - 1)):
            counts[rank] = 0
    return tuple(counts)


def draw_llep(draw: random.Random, layout: Layout, M: int) -> LLEPConfig:
    """Settings that lend often."""
    expert_dp = layout.world_size // (layout.ep * layout.expert_tp)
    replicas = expert_dp > 1 and draw.random() < 0.5
    sharers = layout.ep * (expert_dp if replicas else 1)
    planners = ("tolerant", "lp") if replicas else ("tolerant", "exact", "lla")
    divisors = [ranks for ranks in range(1, sharers) if sharers % ranks == 0]
    per_node = draw.choice((None, draw.choice(divisors)))
    # A node of one rank has nobody to lend to.
    lend_to = draw.choice(LEND_TO) if (per_node or 0) > 1 else "any_node"
    return LLEPConfig(
        planner=draw.choice(planners),
        tolerance=draw.choice((0.0, 0.05, 0.3)),
        capacity_factor=draw.choice((1.0, 1.25)),
        min_tokens_per_gemm=draw.choice((0, 1, 8)),
        imbalance_threshold=draw.choice((None, 1.0, 1.0)),
        replicas="expert-dp" if replicas else "none",
        max_foreign_experts=draw.choice((None, None, draw.randint(0, M), draw.randint(1, M))),
        ranks_per_node=per_node,
        lend_to=lend_to,
        token_assignment=draw.choice(ORDERS),
        foreign_weights=draw.choice((None, *FOREIGN_WEIGHTS)),
        grad_dtype=draw.choice(GRAD_DTYPES),
        expert_gemm=draw.choice(EXPERT_GEMMS),
        scatter_from=draw.choice((0, 2, 3)),
    )


def draw_model(draw: random.Random, layout: Layout, E: int) -> dict[str, Any]:
    """Sizes, router and recompute."""
    K = draw.randint(1, min(4, E))
    score = draw.choice(("softmax", "softmax", "sigmoid"))
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    return {
        "num_layers": draw.choice((1, 2)),
        "hidden_size": draw.choice((16, 32, 48, 64)),
        "num_moe_experts": E,
        "moe_ffn_hidden_size": draw.choice((16, 32, 64)),
        "moe_router_topk": K,
        "moe_router_score_function": score,
        # Of one score alone a softmax is 1.
        "moe_router_pre_softmax": score == "softmax" and (K == 1 or draw.random() < 0.3),
        # Megatron has no biases under expert tensor parallelism.
        "add_bias_linear": draw.random() < 0.2 and layout.expert_tp == 1,
        "gated_linear_unit": draw.random() < 0.7,
        **(recompute if draw.random() < 0.35 else {}),
    }


def draw_ddp(draw: random.Random, dtype: Dtype) -> dict[str, Any]:
    """How gradients are reduced; those of fp64 keep all digits."""
    return {
        "overlap_grad_reduce": draw.random() < 0.5,
        "use_distributed_optimizer": draw.random() < 0.3,
        "bucket_size": draw.choice((None, 1, 3000)),
        "grad_reduce_in_fp32": draw.random() < 0.5 and dtype != "float64",
    }
