"""Lending: expert weights to borrowers in forward, their gradients home in backward.

Foreign weights are plain tensors in one flat buffer a layer and micro-batch: outside parameters,
optimizer, DDP and checkpoints.
"""

from megatron_llep.lending.loan import Loan, Weights
from megatron_llep.lending.nodes import gate, lend, settle
from megatron_llep.lending.shared import SharedLending

__all__ = ["Loan", "SharedLending", "Weights", "gate", "lend", "settle"]
