"""What is known of one rank's (token, expert) pairs, before a plan and after it.

Letters: T tokens of this rank, E experts, H hidden size, N (token, expert) pairs of this rank.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """One rank's (token, expert) pairs, before any plan: by expert, then by token."""

    pair_index: torch.Tensor
    """int64 [N]: position of the pair in the flattened routing map [T, E]."""
    by_token: torch.Tensor | None = None
    """int32 [N]: place of the pair when they are ordered by token, then expert. GPU only."""
    token_ends: torch.Tensor | None = None
    """int32 [T]: where each token's pairs end in that order. GPU only."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The order in which one rank sends its (token, expert) pairs: by slot, then by token."""

    token_index: torch.Tensor
    """int64 [N]: row of the pair's token in the hidden states [T, H]."""
    pair_index: torch.Tensor
    """int64 [N]: position of the pair in the flattened routing map [T, E]."""
    rows_by_token: torch.Tensor | None = None
    """int32 [N]: where each pair is sent, ordered by token, then expert. GPU only."""
    token_ends: torch.Tensor | None = None
    """int32 [T]: where each token's pairs end in `rows_by_token`. GPU only."""

    def keep_for_current_stream(self) -> None:
        """Keep the memory from being used again before the current stream is done with it.

        For schedules that combine tokens on another stream than the one that placed them.
        """
        for tensor in (self.token_index, self.rows_by_token, self.token_ends):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
