"""Pieces of experts in flat buffers: where they lie, and copies between slots and what travels.

Letters: P ranks, F foreign experts of this rank, W numbers in one expert's gradients or units in
its parcel.

*Slots* are [F * W] numbers, one expert after another. What travels is [n] numbers, one piece after
another.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from megatron_llep.lending.transfers import Exchange, Piece


def count_numbers(pieces: Iterable[Piece]) -> int:
    """Numbers in all the pieces."""
    return sum(piece.stop - piece.start for piece in pieces)


def count_by_peer(pieces: Iterable[Piece], num_ranks: int) -> list[int]:
    """[P] numbers in the pieces of each peer."""
    sizes = [0] * num_ranks
    for piece in pieces:
        sizes[piece.peer] += piece.stop - piece.start
    return sizes


def find_parts(piece: Piece, sizes: Iterable[int]) -> Iterator[tuple[int, slice]]:
    """The tensors of an expert, by number, that a piece has numbers of, and which of them.

    Args:
        piece: of the expert.
        sizes: numbers in each of its tensors.
    """
    offset = 0
    for i, size in enumerate(sizes):
        start, stop = (min(max(at - offset, 0), size) for at in (piece.start, piece.stop))
        if start < stop:
            yield i, slice(start, stop)
        offset += size


def split_pieces(flat: torch.Tensor, pieces: Sequence[Piece]) -> tuple[torch.Tensor, ...]:
    """The pieces of what travels, without copying."""
    return flat.split([piece.stop - piece.start for piece in pieces])


def view_piece(slots: torch.Tensor, piece: Piece, width: int) -> torch.Tensor:
    """The place of a piece in the slots."""
    first = piece.expert * width
    return slots[first + piece.start : first + piece.stop]


def make_buffers(
    exchange: Exchange,
    like: torch.Tensor,
    *,
    outgoing: torch.Tensor | None = None,
    incoming: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is sent in an exchange, and what is received; allocated unless given."""
    if outgoing is None:
        outgoing = like.new_empty(count_numbers(exchange.sends))
    if incoming is None:
        incoming = like.new_empty(count_numbers(exchange.receives))
    return outgoing, incoming


def pack(slots: torch.Tensor, pieces: Sequence[Piece], outgoing: torch.Tensor, width: int) -> None:
    """Copy pieces of the slots to what travels, whatever its dtype."""
    for piece, part in zip(pieces, split_pieces(outgoing, pieces), strict=True):
        part.copy_(view_piece(slots, piece, width))


def unpack(
    incoming: torch.Tensor, pieces: Sequence[Piece], slots: torch.Tensor, width: int
) -> None:
    """Copy what travelled to its places in the slots."""
    for piece, part in zip(pieces, split_pieces(incoming, pieces), strict=True):
        view_piece(slots, piece, width).copy_(part)


def add_pieces(
    incoming: torch.Tensor, pieces: Sequence[Piece], slots: torch.Tensor, width: int
) -> None:
    """Add what travelled, in any dtype, to its places in the slots: by rank, so always alike."""
    for piece, part in zip(pieces, split_pieces(incoming, pieces), strict=True):
        view_piece(slots, piece, width).add_(part)
