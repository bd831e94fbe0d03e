"""Multi-latent attention in plain torch, as the DeepSeek-V3 report has it; knows no Megatron.

Letters: s tokens, b sequences, h hidden size, n heads, q rank of queries, r of keys and values,
d dimensions of a head without position, p with, v of a value.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Widths and rotary embedding."""

    n: int
    q: int | None
    r: int
    d: int
    p: int
    v: int
    base: float = 10000.0
    yarn: float | None = None
    """YaRN's factor, from 4096 positions, with beta 32 and 1; None: plain rotary embedding."""
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    eps: float = 1e-5


def attend(x: torch.Tensor, weights: Weights, shape: Shape) -> torch.Tensor:
    """Causal attention over x [s, b, h], of each sequence by itself, position by position.

    Weights, by Megatron's names: "linear_q_down_proj" [q, h], "linear_q_up_proj" [n (d + p), q], or
    "linear_q_proj" [n (d + p), h]; "linear_kv_down_proj" [r + p, h]; "linear_kv_up_proj"
    [n (d + v), r]; "linear_proj" [h, n v]; and of norms, where there are any, "q_norm",
    "kv_norm".
    """
    s = x.shape[0]
    queries = x
    if shape.q is not None:
        queries = x @ weights["linear_q_down_proj"].T
    queries = _norm(queries, weights.get("q_norm"), shape.eps)
    queries = queries @ weights["linear_q_up_proj" if shape.q else "linear_q_proj"].T
    down = x @ weights["linear_kv_down_proj"].T
    latent = _norm(down[..., : shape.r], weights.get("kv_norm"), shape.eps)
    shared = _rotate(down[..., shape.r :], shape)
    both = latent @ weights["linear_kv_up_proj"].T
    heads = []
    for head in range(shape.n):
        query = queries[..., head * (shape.d + shape.p) : (head + 1) * (shape.d + shape.p)]
        mine = both[..., head * (shape.d + shape.v) : (head + 1) * (shape.d + shape.v)]
        key = torch.cat([mine[..., : shape.d], shared], dim=-1)
        query = torch.cat([query[..., : shape.d], _rotate(query[..., shape.d :], shape)], dim=-1)
        scores = torch.einsum("ibc,jbc->bij", query, key) * _scale(shape)
        scores = scores.masked_fill(torch.ones(s, s).triu(1).bool(), -torch.inf)
        heads.append(torch.einsum("bij,jbv->ibv", scores.softmax(-1), mine[..., shape.d :]))
    return torch.cat(heads, dim=-1) @ weights["linear_proj"].T


def _norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    if weight is None:
        return x
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _rotate(x: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Turn neighbouring pairs of x [s, b, p] by the angle of the token's position.

    The order of the dimensions afterwards is of no meaning: queries and keys have the same.
    """
    frequency = torch.tensor([_frequency(i, shape) for i in range(shape.p // 2)])
    angle = torch.arange(x.shape[0])[:, None, None] * frequency
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.cat(
        [even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], dim=-1
    )
    if shape.yarn is None:
        return turned
    return turned * _mscale(shape.yarn, shape.mscale) / _mscale(shape.yarn, shape.mscale_all_dim)


def _frequency(i: int, shape: Shape) -> float:
    plain = shape.base ** (-2 * i / shape.p)
    if shape.yarn is None:
        return plain

    def dimension(turns: float) -> float:
        """Which dimension turns that often within the original positions."""
        return shape.p * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(shape.base))

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), shape.p - 1)
    ramp = min(max((i - low) / max(high - low, 1e-3), 0.0), 1.0)
    return plain * (1 - ramp) + plain / shape.yarn * ramp


def _scale(shape: Shape) -> float:
    factor = 1.0 if shape.yarn is None else _mscale(shape.yarn, shape.mscale_all_dim) ** 2
    return factor / math.sqrt(shape.d + shape.p)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
