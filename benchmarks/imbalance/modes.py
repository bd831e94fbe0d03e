"""What is timed of a method: dispatch alone, the layer, a training step. See `names.MODES`.

Letters: P ranks, N tokens of all ranks, T tokens of this rank, E experts, H hidden size.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from benchmarks.imbalance.data import LayerSizes, StepData, make_dispatch_probs
from benchmarks.imbalance.layer import PlacedMoELayer
from benchmarks.imbalance.methods import Subject
from benchmarks.imbalance.names import DISPATCH, LAYER, TRAIN
from benchmarks.imbalance.oracle import TOLERANCE, Record, check_numbers, check_pairs
from benchmarks.imbalance.reference import Outcome, Reference
from benchmarks.imbalance.witness import gather_records, learn_experts, watch_experts

MOMENTUM = 0.9

Numbers = dict[str, np.ndarray]


class DispatchMode:
    """Tokens go to experts, are weighted there, and come back; forward alone."""

    moves_weights = False

    def __init__(self, subject: Subject, seed: int):
        self.subject, self._seed = subject, seed
        self._weights: torch.Tensor | None = None

    def prepare(self, data: StepData) -> None:
        """What is not timed."""
        self._weights, self._probs = make_dispatch_probs(data, self._seed)

    @torch.no_grad()
    def run(self, data: StepData, watch: Callable[..., None] = lambda *_: None) -> None:
        """What is timed; `watch` is shown rows, rows of each slot, and their weights."""
        layer, dispatcher = self.subject.layer, self.subject.layer.token_dispatcher
        probs, routing_map = self._probs, data.own_map
        if isinstance(layer, PlacedMoELayer):
            probs, routing_map = layer.to_slots(probs, routing_map)
        rows, probs = dispatcher.dispatch_preprocess(data.own_hidden, routing_map, probs)
        rows, probs = dispatcher.token_dispatch(rows, probs)
        rows, per_slot, probs = dispatcher.dispatch_postprocess(rows, probs)
        watch(rows, per_slot, probs)
        back = dispatcher.combine_preprocess(rows * probs.unsqueeze(1))
        self.output = dispatcher.combine_postprocess(dispatcher.token_combine(back))

    def check(self, data: StepData, expected: Outcome | None) -> tuple[list[Record], float]:
        """Run once and hold it against the routing; records of all ranks, largest difference.

        Raises:
            OracleError: it did something else.
        """
        self.prepare(data)
        assert self._weights is not None
        seen = []

        def watch(rows: torch.Tensor, per_slot: torch.Tensor, probs: torch.Tensor) -> None:
            experts = self.subject.expert_of_slot(data.rank)
            which = np.repeat(experts, per_slot.cpu().numpy())
            seen.append((rows.clone(), probs.clone(), which))

        self.run(data, watch)
        records = gather_records(seen, data)
        weights = self._weights.double()
        check_pairs(
            records,
            data.routing,
            weights=weights.cpu().numpy(),
            quota=self.subject.count_pairs(data.routing),
            tolerance=0.0,  # nothing is computed with them
        )
        summed = data.hidden.double() * weights.sum(dim=1, keepdim=True)
        worst = check_numbers(
            {"output": _to_numpy(self.output.squeeze(1))},
            {"output": _to_numpy(summed[data.rows])},
            tolerance=TOLERANCE,
        )
        return records, worst

    def compare_weights(self, reference: Reference, steps: int) -> None:
        """Nothing was trained."""


class LayerMode:
    """Megatron's layer, forward and backward, router included."""

    moves_weights = True
    gradient_name = "grad"
    gradient_scale = 1.0
    """Of the gradients that are checked, to the reference's."""

    def __init__(self, subject: Subject, seed: int):
        self.subject = subject
        self._start()

    def _start(self) -> None:
        self.module: torch.nn.Module = self.subject.layer
        for parameter in self.subject.layer.parameters():
            # As under training: gradients have a place of their own.
            parameter.grad = torch.zeros_like(parameter)

    def prepare(self, data: StepData) -> None:
        """What is not timed: the choice, and gradients of zero."""
        self.subject.layer.router.follow(data.own_map)
        self.hidden = data.own_hidden.detach().requires_grad_()
        for parameter in self.subject.layer.parameters():
            parameter.grad.zero_()

    def run(self, data: StepData) -> None:
        """What is timed."""
        self.output = self.module(self.hidden)[0]
        self.output.backward(data.own_gradient)
        self._add_up_replicas()

    def check(self, data: StepData, expected: Outcome | None) -> tuple[list[Record], float]:
        """Run once and hold it against routing and reference.

        Raises:
            OracleError: it did something else.
        """
        assert expected is not None
        experts = learn_experts(self.subject)
        self.prepare(data)
        with watch_experts(self.subject, experts) as seen:
            self.run(data)
        records = gather_records(seen, data)
        check_pairs(
            records,
            data.routing,
            weights=_to_numpy(expected.weights),
            quota=self.subject.count_pairs(data.routing),
        )
        worst = check_numbers(self._read(), self._cut(expected, data), tolerance=TOLERANCE)
        return records, worst

    def compare_weights(self, reference: Reference, steps: int) -> None:
        """Nothing was trained."""

    def _add_up_replicas(self) -> None:
        if isinstance(self.subject.layer, PlacedMoELayer):
            with torch.no_grad():
                self.subject.layer.add_up_replicas(self.gradient_name)

    def _read(self) -> Numbers:
        """This rank's output and gradients; the router's of all ranks' tokens."""
        layer, name = self.subject.layer, self.gradient_name
        of_router = getattr(layer.router.weight, name).clone()
        self._sum_router(of_router)
        found = {
            "output": self.output.detach().squeeze(1),
            "gradient of the input": self.hidden.grad.squeeze(1),
            "gradient of router": of_router,
        }
        for slot, expert, weight in self._list_weights():
            found[f"gradient of {expert} in slot {slot}"] = getattr(weight, name)
        return {name: _to_numpy(each) for name, each in found.items()}

    def _cut(self, expected: Outcome, data: StepData) -> Numbers:
        """This rank's part of the reference."""
        wanted = {
            "output": expected.output[data.rows],
            "gradient of the input": expected.input_gradient[data.rows],
            "gradient of router": expected.gradients["router"] * self.gradient_scale,
        }
        for slot, expert, _ in self._list_weights():
            gradient = expected.gradients[expert] * self.gradient_scale
            wanted[f"gradient of {expert} in slot {slot}"] = gradient
        return {name: _to_numpy(each) for name, each in wanted.items()}

    def _list_weights(self) -> list[tuple[int, str, torch.nn.Parameter]]:
        """Slot, name in the reference, and parameter, of this rank's experts."""
        own = self.subject.expert_of_slot(dist.get_rank()).tolist()
        return [
            (slot, f"expert {expert} {name}", linear.weight)
            for slot, (expert, module) in enumerate(
                zip(own, self.subject.layer.experts.local_experts, strict=False)
            )
            for name, linear in (("fc1", module.linear_fc1), ("fc2", module.linear_fc2))
        ]

    def _sum_router(self, gradient: torch.Tensor) -> None:
        dist.all_reduce(gradient)


class TrainMode(LayerMode):
    """A training step: Megatron's DDP around the layer, and its optimizer."""

    gradient_name = "main_grad"

    def _start(self) -> None:
        subject = self.subject
        self.gradient_scale = 1 / subject.sizes.num_ranks  # DDP's mean
        self.module = DistributedDataParallel(
            subject.layer.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True),
            subject.layer,
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="sgd",
                lr=choose_rate(subject.sizes),
                weight_decay=0.0,
                sgd_momentum=MOMENTUM,
                clip_grad=0.0,
            ),
            [self.module],
            use_gloo_process_groups=False,
        )

    def prepare(self, data: StepData) -> None:
        """What is not timed: the choice."""
        self.subject.layer.router.follow(data.own_map)
        self.hidden = data.own_hidden.detach().requires_grad_()

    def run(self, data: StepData) -> None:
        """What is timed."""
        self.module.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.output = self.module(self.hidden)[0]
        self.output.backward(data.own_gradient)
        self.module.finish_grad_sync()
        self._add_up_replicas()
        self.optimizer.step()

    def compare_weights(self, reference: Reference, steps: int) -> None:
        """Hold what so many steps have added to the weights against the reference's.

        Raises:
            OracleError: it is something else.
        """
        found, wanted, rounding = {}, {}, {}
        weights = [(0, "router", self.subject.layer.router.weight), *self._list_weights()]
        for slot, name, weight in weights:
            start, key = reference.start[name], f"change of {name} in slot {slot}"
            found[key] = _to_numpy(weight - start)
            wanted[key] = _to_numpy(reference.parameters[name] - start)
            # Each step rounds the weights, not their change, to fp32.
            rounding[key] = steps * 2.0**-24 * float(weight.abs().max())
        check_numbers(found, wanted, tolerance=TOLERANCE, rounding=rounding)

    def _sum_router(self, gradient: torch.Tensor) -> None:
        """DDP has done so."""


def choose_rate(sizes: LayerSizes) -> float:
    """The learning rate: weights change by some thousandths in a step, however many tokens."""
    return 1e-2 * sizes.num_ranks / (sizes.num_ranks * sizes.tokens) ** 0.5


MODES = {DISPATCH: DispatchMode, LAYER: LayerMode, TRAIN: TrainMode}


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
