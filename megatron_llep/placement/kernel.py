"""Placement on a GPU: Triton kernels that give what `tokens.py` gives on a CPU.

Letters: T tokens of this rank, E experts, H hidden size, N (token, expert) pairs of this rank,
C chunks.

    count   how many pairs each tile of tokens has for each expert, and each token has
    list    pairs by expert; with `count` it needs no plan, so it runs while the host waits for one
    place   one thread a pair: finds its chunk by bisection, and writes all indices at once
    sum     each token's rows added in the order of its experts, in fp32: no atomics, so the same
            every time. It is the backward of gathering rows, and the forward of combining them.

Gathering rows is left to `index_select`: it copies N * H numbers at the memory's speed, next to
which the indices cost nothing, so there is nothing to gain from fusing them into it.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from megatron_llep.placement.chunks import to_device
from megatron_llep.placement.pairs import Pairs, Placement

_TILE_TOKENS, _TILE_EXPERTS = 32, 64
_PAIRS_PER_PROGRAM = 512
_COLUMNS_PER_PROGRAM = 1024


def list_pairs(routing_map: torch.Tensor, size: int) -> Pairs:
    """As `tokens.list_pairs`, with the order by token besides.

    Args:
        routing_map: bool [T, E].
        size: N or more, below 2^31.
    """
    assert size < 2**31
    T, E = routing_map.shape
    chosen = routing_map.contiguous().view(torch.uint8)
    num_tiles = triton.cdiv(T, _TILE_TOKENS)
    per_tile = chosen.new_empty((E, num_tiles), dtype=torch.int32)
    per_token = chosen.new_empty(T, dtype=torch.int32)
    pair_index = chosen.new_empty(size, dtype=torch.int64)
    by_token = torch.empty_like(pair_index, dtype=torch.int32)
    tile = {"num_experts": E, "TILE_T": _TILE_TOKENS, "TILE_E": _TILE_EXPERTS}
    if T:
        _count[(num_tiles,)](chosen, per_tile, per_token, T, num_tiles, **tile)
    pair_ends = per_tile.view(-1).cumsum(0, dtype=torch.int32)
    token_ends = per_token.cumsum(0, dtype=torch.int32)
    if T:
        _list[(num_tiles,)](
            chosen, pair_ends, token_ends, pair_index, by_token, size, T, num_tiles, **tile
        )
    return Pairs(pair_index=pair_index, by_token=by_token, token_ends=token_ends)


def place_pairs(pairs: Pairs, chunks: np.ndarray, num_experts: int) -> Placement:
    """Order pairs by physical slot.

    Args:
        pairs: from `list_pairs` here; N or more.
        chunks: int64 [2 or more, C], first pair and length of each.
        num_experts: E.
    """
    assert pairs.by_token is not None
    first, length = chunks[:2]
    end = np.cumsum(length)
    num_pairs, num_chunks = int(length.sum()), len(length)
    table = to_device(
        np.stack((end, first - end + length)).astype(np.int32), pairs.pair_index.device
    )
    token_index = pairs.pair_index.new_empty(num_pairs)
    pair_index = torch.empty_like(token_index)
    rows_by_token = pairs.by_token.new_empty(num_pairs)
    if num_pairs:
        _place[(triton.cdiv(num_pairs, _PAIRS_PER_PROGRAM),)](
            pairs.pair_index,
            pairs.by_token,
            table,
            token_index,
            pair_index,
            rows_by_token,
            num_pairs,
            num_chunks,
            (num_chunks - 1).bit_length(),
            num_experts=num_experts,
            PAIRS=_PAIRS_PER_PROGRAM,
        )
    return Placement(
        token_index=token_index,
        pair_index=pair_index,
        rows_by_token=rows_by_token,
        token_ends=pairs.token_ends,
    )


def sum_rows(
    rows: torch.Tensor, rows_by_token: torch.Tensor, token_ends: torch.Tensor
) -> torch.Tensor:
    """Add each token's rows, in the order of its experts: [N, H] -> [T, H].

    Sums are in fp32 (fp64 for fp64), rounded once to the dtype of the rows.
    """
    T, H = len(token_ends), rows.shape[1]
    output = rows.new_empty(T, H)
    if output.numel():
        _sum[(T, triton.cdiv(H, _COLUMNS_PER_PROGRAM))](
            rows.contiguous(),
            rows_by_token,
            token_ends,
            output,
            H,
            DTYPE=tl.float64 if rows.dtype == torch.float64 else tl.float32,
            COLUMNS=_COLUMNS_PER_PROGRAM,
        )
    return output


# do_not_specialize: numbers that change from one micro-batch to the next must not compile a kernel
# again.


@triton.jit
def _load_tile(chosen, token, expert, num_tokens, num_experts: tl.constexpr):
    """int32 [TILE_T, TILE_E]: 1 where the token goes to the expert."""
    inside = (token[:, None] < num_tokens) & (expert[None, :] < num_experts)
    offset = token[:, None].to(tl.int64) * num_experts + expert[None, :]
    return tl.load(chosen + offset, mask=inside, other=0).to(tl.int32)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def _count(
    chosen,
    per_tile,
    per_token,
    num_tokens,
    num_tiles,
    num_experts: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_E: tl.constexpr,
):
    """Pairs of a tile of tokens: per expert [E, tiles] and per token [T]."""
    tile = tl.program_id(0)
    token = tile * TILE_T + tl.arange(0, TILE_T)
    in_token = tl.zeros([TILE_T], tl.int32)
    for first in range(0, num_experts, TILE_E):
        expert = first + tl.arange(0, TILE_E)
        pairs = _load_tile(chosen, token, expert, num_tokens, num_experts)
        tl.store(per_tile + expert * num_tiles + tile, tl.sum(pairs, 0), mask=expert < num_experts)
        in_token += tl.sum(pairs, 1)
    tl.store(per_token + token, in_token, mask=token < num_tokens)


@triton.jit(do_not_specialize=["size", "num_tokens", "num_tiles"])
def _list(
    chosen,
    pair_ends,
    token_ends,
    pair_index,
    by_token,
    size,
    num_tokens,
    num_tiles,
    num_experts: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_E: tl.constexpr,
):
    """Write each pair of a tile of tokens to its place in the order by expert."""
    tile = tl.program_id(0)
    token = tile * TILE_T + tl.arange(0, TILE_T)
    before = (token > 0) & (token < num_tokens)
    token_place = tl.load(token_ends + token - 1, mask=before, other=0)
    for first in range(0, num_experts, TILE_E):
        expert = first + tl.arange(0, TILE_E)
        pairs = _load_tile(chosen, token, expert, num_tokens, num_experts)
        cell = expert * num_tiles + tile
        start = tl.load(pair_ends + cell - 1, mask=(cell > 0) & (expert < num_experts), other=0)
        place = start[None, :] + tl.cumsum(pairs, 0) - pairs
        keep = (pairs != 0) & (place < size)
        pair = token[:, None].to(tl.int64) * num_experts + expert[None, :]
        tl.store(pair_index + place, pair, mask=keep)
        tl.store(by_token + place, token_place[:, None] + tl.cumsum(pairs, 1) - pairs, mask=keep)
        token_place += tl.sum(pairs, 1)


@triton.jit(do_not_specialize=["num_pairs", "num_chunks", "num_steps"])
def _place(
    listed_pair,
    listed_by_token,
    table,
    token_index,
    pair_index,
    rows_by_token,
    num_pairs,
    num_chunks,
    num_steps,
    num_experts: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Fill the rows of a placement; `table` [2, C] has each chunk's last row + 1 and its shift."""
    row = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = row < num_pairs
    low = tl.zeros([PAIRS], tl.int32)
    high = low + num_chunks - 1
    for _ in range(num_steps):  # the first chunk that ends after the row
        middle = (low + high) // 2
        holds = tl.load(table + middle) > row
        high = tl.where(holds, middle, high)
        low = tl.where(holds, low, middle + 1)
    listed = row + tl.load(table + num_chunks + low, mask=inside, other=0)
    pair = tl.load(listed_pair + listed, mask=inside, other=0)
    tl.store(token_index + row, pair // num_experts, mask=inside)
    tl.store(pair_index + row, pair, mask=inside)
    by_token = tl.load(listed_by_token + listed, mask=inside, other=0)
    tl.store(rows_by_token + by_token, row, mask=inside)


@triton.jit
def _sum(
    rows,
    rows_by_token,
    token_ends,
    output,
    num_columns,
    DTYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add the rows of one token, in some of their columns."""
    token = tl.program_id(0).to(tl.int64)  # N * H and T * H may be above 2^31
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < num_columns
    start = tl.load(token_ends + token - 1, mask=token > 0, other=0)
    end = tl.load(token_ends + token)
    total = tl.zeros([COLUMNS], DTYPE)
    for place in range(start, end):
        row = tl.load(rows_by_token + place).to(tl.int64)
        total += tl.load(rows + row * num_columns + column, mask=inside, other=0).to(DTYPE)
    tl.store(output + token * num_columns + column, total.to(output.dtype.element_ty), mask=inside)
