"""GRPO within `megatron.training`'s loop, through the seam it has for Megatron-LM's `megatron.rl`.

The wheel of megatron-core has the seam and the flags and not that package. `install` puts a `Loop`
in its place: three names of `megatron.training.training`, set here and nowhere else.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.core.utils import unwrap_model
from megatron.training import print_rank_last
from megatron.training import training as megatron_loop

from megatron_llep.integration.watch_loads import watch_loads
from megatron_llep.training.generation import as_in_evaluation
from megatron_llep.training.hf.install import fill_from_hf
from megatron_llep.training.report import average, format_values, log_scalars
from megatron_llep.training.rl.batch import MicroBatch, Sample, make_micro_batches
from megatron_llep.training.rl.grpo import get_group_advantages
from megatron_llep.training.rl.replay import record_routing, start_replay, stop_replay
from megatron_llep.training.rl.rollout import Answers, Player
from megatron_llep.training.rl.step import get_negative_logprobs
from megatron_llep.training.rl.task import load_task

_PREFIX = "rl/"
State = dict[str, Any]
LoadWeights = Callable[[list[torch.nn.Module]], None]
"""Puts a checkpoint's weights into the chunks of an unwrapped model."""


@dataclass(frozen=True)
class Rollout:
    """What the steps of one rollout train on."""

    number: int
    micro_batches: list[MicroBatch]


def install(args: Namespace) -> dict[str, Any]:
    """Have Megatron's loop train on the task of `--rl-task`.

    The policy that `--grpo-kl-beta` holds on to is that of `--pretrained-checkpoint`, which
    Megatron loads itself, or of `--hf-load`.

    Args:
        args: Megatron's, validated; the tokenizer is built and process groups need not be.

    Returns:
        No keywords for `megatron.training.pretrain`.

    Raises:
        ValueError: the task cannot be made, or a prompt does not fit.
    """
    player = Player(args, load_task(args.rl_task))
    load_reference: LoadWeights | None = None
    if args.hf_load is not None:
        load_reference = partial(fill_from_hf, folder=Path(args.hf_load), args=args)
    megatron_loop.rl_utils = Loop(args, player, load_reference)
    megatron_loop.has_rl_utils = True
    megatron_loop.RL_LOGGABLE_TIMER_NAMES = []
    # With --eval-iters above 0 Megatron would set it, and want a test set too.
    args.do_valid = bool(args.eval_interval) and player.evaluates
    return {}


class Loop:
    """What Megatron's loop calls `rl_utils`."""

    def __init__(self, args: Namespace, player: Player, load_reference: LoadWeights | None):
        self._args = args
        self._player = player
        self._load_reference = load_reference
        self._rollout: Rollout | None = None
        self._reference: State | None = None
        self._evaluated: int | None = None
        self._line: dict[str, float] = {}
        samples = args.grpo_prompts_per_step * args.grpo_group_size
        self._steps_a_rollout = samples * args.grpo_iterations // args.global_batch_size

    def get_grpo_data_iterator(
        self,
        model: list[torch.nn.Module],
        inference_model: None,
        optimizer: Any,
        iteration: int,
        ref_state_dict: State,
        **settings: Any,
    ) -> RerunDataIterator:
        """This step's micro-batches, of a new rollout where the last one is used up.

        Args:
            model: one chunk, wrapped.
            inference_model: always None: the model that trains answers.
            optimizer: not used.
            iteration: steps done so far.
            ref_state_dict: the weights of `--pretrained-checkpoint`, if that is given.
            settings: Megatron's `--grpo-*` values, which are in its arguments too.
        """
        if iteration == 0 and self._args.do_valid:
            self.evaluate_and_print_results_rl(None, model, optimizer, iteration)
        number, step = divmod(iteration, self._steps_a_rollout)
        if self._rollout is None or self._rollout.number != number:
            self._rollout = self._roll_out(model[0], number, iteration, ref_state_dict)
        return RerunDataIterator(self._iterate(self._rollout, step))

    def evaluate_and_print_results_rl(
        self,
        data_iterator: None,
        model: list[torch.nn.Module],
        optimizer: Any,
        iteration: int,
        **settings: Any,
    ) -> None:
        """Answer the held-out prompts greedily, after so many steps; once, also at the very end."""
        if self._evaluated == iteration:
            return
        self._evaluated = iteration
        answers = self._player.evaluate(model[0])
        values = average(
            {"eval_reward": answers.rewards, "eval_exact_match": answers.exact_matches}
        )
        log_scalars(values, iteration, prefix=_PREFIX)
        print_rank_last(f" evaluation at iteration {iteration} |{format_values(values)}")

    def log_rl_throughput_metrics(
        self, args: Namespace, batch_size: int, seconds: float, iteration: int, wandb_writer: Any
    ) -> str:
        """What the console line of a step says of its rollout."""
        return format_values(self._line)

    def rl_inference_interface_shutdown(self) -> None:
        """Nothing to shut down: no engine of its own answers."""

    def _iterate(self, rollout: Rollout, step: int) -> Iterator[MicroBatch]:
        """The micro-batches of one of the rollout's steps; each epoch has the same order."""
        ranks = parallel_state.get_data_parallel_world_size()
        number = self._args.global_batch_size // (self._args.micro_batch_size * ranks)
        all_of_them = rollout.micro_batches
        return (
            all_of_them[i % len(all_of_them)] for i in range(step * number, (step + 1) * number)
        )

    def _roll_out(
        self, model: torch.nn.Module, number: int, iteration: int, ref_state_dict: State
    ) -> Rollout:
        if self._args.overlap_param_gather:
            # The optimizer's last step may still be on its way into the weights.
            model.start_param_sync(force_sync=True)
        answers = self._player.roll_out(model, number)
        group = self._args.grpo_group_size
        rewards = torch.tensor(answers.rewards, dtype=torch.float64).view(-1, group)
        advantages = get_group_advantages(rewards).flatten().tolist()
        start = time.perf_counter()
        micro_batches = self._make_micro_batches(answers, advantages)
        with watch_loads(model) as loads, as_in_evaluation(model):
            micro_batches = [self._add_old_logprobs(model, batch) for batch in micro_batches]
        before, after = loads.gather().worst_layer
        if self._args.grpo_kl_beta > 0:
            micro_batches = self._add_reference_logprobs(model, micro_batches, ref_state_dict)
        values = {
            "mean_reward": answers.rewards,
            "mean_length": [float(len(answer)) for answer in answers.tokens],
            "truncated": self._find_truncated(answers),
            "nonzero_groups_ratio": (np.ptp(rewards.numpy(), axis=1) > 0).tolist(),
            "logprob_difference": _compare_logprobs(answers, micro_batches),
            "rollout_seconds": [answers.seconds],
            "logprobs_seconds": [time.perf_counter() - start],
            "logprobs_imbalance_before": [before],
            "logprobs_imbalance_after": [after],
        }
        means = average(values | {name: [value] for name, value in answers.imbalance.items()})
        # Under the number that Megatron gives the step that comes now.
        log_scalars(means, iteration + 1, prefix=_PREFIX)
        self._line = {name: means[name] for name in ("mean_reward", "mean_length")}
        return Rollout(number, micro_batches)

    def _make_micro_batches(
        self, answers: Answers, advantages: Sequence[float]
    ) -> list[MicroBatch]:
        args = self._args
        samples = [
            Sample(
                prompt=question.ids,
                answer=answers.tokens[place],
                advantage=advantages[place],
                routing=None if answers.routing is None else answers.routing[place],
            )
            for place, question in enumerate(answers.questions)
        ]
        return make_micro_batches(
            samples,
            args.micro_batch_size,
            pad_id=self._player.chat.pad_id,
            multiple_of=args.tensor_model_parallel_size,
            num_experts=args.num_experts or 1,
            sequence_parallel=args.sequence_parallel,
        )

    def _add_old_logprobs(self, model: torch.nn.Module, batch: MicroBatch) -> MicroBatch:
        """By the weights that answered, in the forward that training will repeat."""
        if batch.routing is not None:
            start_replay(batch.routing)
        with ExitStack() as stack:
            rows = None
            if self._args.rl_routing_replay == "R2":
                rows = stack.enter_context(record_routing())
            old = -get_negative_logprobs(model, batch).float()
        stop_replay()
        return replace(batch, old_logprobs=old, routing=batch.routing if rows is None else rows)

    def _add_reference_logprobs(
        self, model: torch.nn.Module, batches: list[MicroBatch], ref_state_dict: State
    ) -> list[MicroBatch]:
        """By the reference's weights, in the model for that long, and with its own routing."""
        if self._reference is None:
            self._reference = self._get_reference(model, ref_state_dict)
        mine = _copy_state(model)
        try:
            model.load_state_dict(self._reference)
            with as_in_evaluation(model):
                logprobs = [-get_negative_logprobs(model, batch).float() for batch in batches]
        finally:
            model.load_state_dict(mine)
        return [
            replace(batch, reference_logprobs=each)
            for batch, each in zip(batches, logprobs, strict=True)
        ]

    def _get_reference(self, model: torch.nn.Module, ref_state_dict: State) -> State:
        if self._args.pretrained_checkpoint is not None or self._load_reference is None:
            return ref_state_dict
        mine = _copy_state(model)
        self._load_reference(unwrap_model([model]))
        reference = _copy_state(model)
        model.load_state_dict(mine)
        return reference

    def _find_truncated(self, answers: Answers) -> list[bool]:
        ends = self._player.chat.end_ids
        return [answer[-1] not in ends for answer in answers.tokens]


def _copy_state(model: torch.nn.Module) -> State:
    """Of weights and buffers, on the host."""
    state = model.state_dict()
    return {name: value.cpu() if torch.is_tensor(value) else value for name, value in state.items()}


def _compare_logprobs(answers: Answers, batches: list[MicroBatch]) -> list[float]:
    """How far those of generation are from those of training, for each token of the answers."""
    differences: list[float] = []
    rollout = iter(answers.logprobs)
    for batch in batches:
        assert batch.old_logprobs is not None
        for row, mask in zip(batch.old_logprobs, batch.mask, strict=True):
            trained = row[mask > 0].tolist()
            pairs = zip(trained, next(rollout), strict=True)
            differences += [abs(mine - other) for mine, other in pairs]
    return differences
