"""On which terms a layer lends: what its settings make of a plan."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.config import LLEPConfig
from megatron_llep.lending.loan import WeightLoan
from megatron_llep.lending.offer import Offer
from megatron_llep.lending.shared import SharedLending
from megatron_llep.lending.trained import find_common_dtype
from megatron_llep.planner import Plan


class Lender:
    """Of one layer; it keeps settings only."""

    def __init__(
        self,
        config: TransformerConfig,
        llep: LLEPConfig,
        *,
        group: dist.ProcessGroup,
        node_size: int,
        shared: SharedLending,
        note_bytes: Callable[[int, int], None],
    ):
        """Of a model's and LLEP's settings; the rest as for `WeightLoan`."""
        self._config = config
        self._llep = llep
        self._group = group
        self._node_size = node_size
        self._shared = shared
        self._note_bytes = note_bytes

    def make_loan(self, plan: Plan, offer: Offer, trains: int) -> WeightLoan:
        """Of what this rank lends and borrows under a plan.

        Args:
            plan: that lends something.
            offer: what this rank has to lend.
            trains: which weights of an expert some rank trains.
        """
        return WeightLoan(
            plan,
            offer.natives,
            group=self._group,
            scatter_from=self._llep.scatter_from,
            node_size=self._node_size,
            grad_dtype=self._grad_dtype(find_common_dtype(offer.natives[0])),
            trains=trains,
            refetch=self.refetches(),
            shared=self._shared,
            note_bytes=self._note_bytes,
        )

    def refetches(self) -> bool:
        """Whether foreign weights of a forward are freed between it and its backward."""
        if is_checkpointing():  # backward follows at once, or this forward is not kept at all
            return False
        in_pipeline = self._config.pipeline_model_parallel_size > 1
        choice = self._llep.foreign_weights or ("refetch" if in_pipeline else "keep")
        return choice == "refetch"

    def _grad_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which gradients of weights of a dtype return."""
        if self._llep.grad_dtype == "fp32":
            # Not for fp64 parameters, whose gradients must not lose digits on the way.
            return torch.promote_types(torch.float32, dtype)
        return dtype


def start_lending(offer: Offer, loan: WeightLoan) -> None:
    """Start to send lent experts and to receive foreign ones."""
    for wait in offer.weight_waits:
        wait()
    loan.start_fetch()
