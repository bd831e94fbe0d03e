"""The layer without any dispatcher, in float64: what outputs and gradients have to be.

Every rank has all experts here and computes all tokens.

Letters: N tokens, E experts, K experts of a token, H hidden size, F size of an expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import silu

from benchmarks.imbalance.data import LayerSizes, StepData, make_expert, make_router


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """Of all tokens."""

    output: torch.Tensor
    """[N, H]."""
    input_gradient: torch.Tensor
    """[N, H]."""
    weights: torch.Tensor
    """[N, K], the router's of each pair."""
    gradients: Mapping[str, torch.Tensor]
    """Of the parameters, by name."""


class Reference:
    """A router and E gated experts; also trains, with momentum."""

    def __init__(self, sizes: LayerSizes, seed: int, device: str):
        self.parameters = {"router": make_router(sizes, seed)}
        for expert in range(sizes.num_experts):
            first, second = make_expert(sizes, expert, seed)
            self.parameters |= {f"expert {expert} fc1": first, f"expert {expert} fc2": second}
        self.parameters = {
            name: weight.to(device, torch.float64).requires_grad_()
            for name, weight in self.parameters.items()
        }
        self.start = {name: weight.detach().clone() for name, weight in self.parameters.items()}
        self._momentum: dict[str, torch.Tensor] = {}

    def run(self, data: StepData) -> Outcome:
        """Forward and backward."""
        hidden = data.hidden.to(torch.float64).requires_grad_()
        logits = hidden @ self.parameters["router"].T
        weights = logits.gather(1, data.experts).softmax(dim=1)
        output = torch.zeros_like(hidden)
        for expert in range(data.routing.num_experts):
            token, choice = (data.experts == expert).nonzero(as_tuple=True)
            first, second = (self.parameters[f"expert {expert} {fc}"] for fc in ("fc1", "fc2"))
            gate, up = (hidden[token] @ first.T).chunk(2, dim=1)
            rows = (silu(gate) * up) @ second.T
            output = output.index_add(0, token, rows * weights[token, choice].unsqueeze(1))
        names = list(self.parameters)
        found = torch.autograd.grad(
            output,
            [hidden, *(self.parameters[name] for name in names)],
            data.gradient.to(torch.float64),
        )
        return Outcome(
            output=output.detach(),
            input_gradient=found[0],
            weights=weights.detach(),
            gradients=dict(zip(names, found[1:], strict=True)),
        )

    def descend(self, gradients: Mapping[str, torch.Tensor], rate: float, momentum: float) -> None:
        """One step of stochastic gradient descent with momentum."""
        with torch.no_grad():
            for name, gradient in gradients.items():
                if name in self._momentum:
                    gradient = momentum * self._momentum[name] + gradient
                self._momentum[name] = gradient
                self.parameters[name] -= rate * gradient
