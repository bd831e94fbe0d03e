"""A module of M experts that hosts F foreign ones, against a module that has all M + F."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.transformer_config import TransformerConfig
from te_experts import TE_CONFIG, make_experts

from megatron_llep.experts.kinds import make_lendable
from megatron_llep.lending.parcel import Parcel
from support.training import Run, make_config

NATIVE = 3
TOKENS = (5, 0, 7, 3, 12)
"""By expert: natives, then foreign ones."""
ROWS = [sum(TOKENS[:NATIVE]), sum(TOKENS[NATIVE:])]
SLOTS = 2 * NATIVE


def make_expert_config(**changes: Any) -> TransformerConfig:
    """Configuration of experts alone, in fp32 unless changed."""
    return make_config(Run(config=TE_CONFIG | changes))


@dataclass
class Modules:
    """The same M + F experts twice."""

    whole: torch.nn.Module
    module: torch.nn.Module
    """M natives."""
    foreign: list[tuple[torch.Tensor, ...]]
    lendable: Any

    @classmethod
    def make(cls, config: TransformerConfig, device: str = "cpu") -> "Modules":
        torch.manual_seed(1)
        whole = make_experts(len(TOKENS), config, device)
        module = make_experts(NATIVE, config, device)
        lendable, everyone = make_lendable(module), make_lendable(whole).weights()
        with torch.no_grad():
            for native, weights in zip(lendable.weights(), everyone, strict=False):
                for mine, other in zip(native, weights, strict=True):
                    mine.copy_(other)
        foreign = _copy_into_one_buffer(everyone[NATIVE:], config.gradient_accumulation_fusion)
        return cls(whole, module, foreign, lendable)

    def compute(self, hidden: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        """Natives and foreign experts, as a layer that borrowed them has it done."""
        per_slot = torch.tensor(TOKENS + (0,) * (SLOTS - len(TOKENS)))
        rows = list(zip(hidden.split(ROWS), probs.split(ROWS), strict=True))
        return torch.cat(
            self.lendable.compute(rows, per_slot, lambda hidden: (hidden, self.foreign))
        )

    def gradients(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Of all weights: as the module of M + F has them, and as host and foreign experts do."""
        expected = [w for expert in make_lendable(self.whole).weights() for w in expert]
        hosted = [w for expert in self.lendable.weights() + self.foreign for w in expert]
        return [_gradient(w) for w in expected], [_gradient(w) for w in hosted]


def _copy_into_one_buffer(
    experts: list[tuple[torch.Tensor, ...]], with_main_grad: bool
) -> list[tuple[torch.Tensor, ...]]:
    """Tensors over one storage, as those that are lent."""
    parcel = Parcel.of(experts[0])
    copies = parcel.split(torch.cat([part for each in experts for part in parcel.flatten(each)]))
    for weight in (each for expert in copies for each in expert):
        weight.requires_grad_()
        if with_main_grad:
            weight.main_grad = torch.zeros(weight.shape, device=weight.device)
    return copies


def _gradient(weight: torch.Tensor) -> torch.Tensor:
    # A kernel that adds to main_grad does so for weights; biases have a gradient of their own.
    fused = weight.grad is None
    return weight.main_grad if fused else weight.grad


def run_both(modules: Modules, config: TransformerConfig) -> list[tuple[torch.Tensor, ...]]:
    """Forward and backward of both; pairs that must be equal: outputs, then inputs' gradients."""
    return run_micro_batches(modules, config, 1)


def run_micro_batches(
    modules: Modules, config: TransformerConfig, micro_batches: int
) -> list[tuple[torch.Tensor, ...]]:
    """As `run_both`: all forwards, then all backwards in the same order, as in a pipeline."""
    device, dtype = next(modules.module.parameters()).device, config.params_dtype
    size = (sum(TOKENS), config.hidden_size)
    pairs, pending = [], []
    for _ in range(micro_batches):
        hidden = torch.randn(size, device=device, dtype=dtype)
        probs = torch.rand(sum(TOKENS), device=device)
        ours, theirs = ([x.clone().requires_grad_() for x in (hidden, probs)] for _ in range(2))
        with get_fp8_context(config):
            expected, _ = modules.whole(theirs[0], torch.tensor(TOKENS), theirs[1])
            output = modules.compute(*ours)
        pending.append((output, ours, expected, theirs))
    for output, ours, expected, theirs in pending:
        grad = torch.randn(size, device=device, dtype=dtype)
        expected.backward(grad)
        output.backward(grad)
        pairs.append((output, expected))
        pairs += [(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True)]
    return pairs
