"""Predicted time, memory and traffic of a model's step under plain EP, each planner and EPLB."""

from megatron_llep.offline.simulator.models import MODELS, ModelShape, get_model
from megatron_llep.offline.simulator.run import METHODS, Case, Outcome, simulate

__all__ = ["METHODS", "MODELS", "Case", "ModelShape", "Outcome", "get_model", "simulate"]
