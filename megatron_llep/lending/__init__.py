"""Lending: expert weights to borrowers in forward, their gradients home in backward.

Foreign weights are plain tensors in one flat buffer a layer and micro-batch: outside parameters,
optimizer, DDP and checkpoints.
"""

from megatron_llep.lending.loan import Loan
from megatron_llep.lending.nodes import gate, lend, recall, relay, settle
from megatron_llep.lending.packing import Weights
from megatron_llep.lending.shared import SharedLending

__all__ = ["Loan", "SharedLending", "Weights", "gate", "lend", "recall", "relay", "settle"]
