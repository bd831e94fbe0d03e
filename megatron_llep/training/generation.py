"""Answers from the model that trains, token by token over a key-value cache.

Letters: b prompts of this rank, s tokens of one forward, t tokens so far, V vocabulary, L MoE
layers, K experts of a token.

All ranks run the same number of forwards, whatever their prompts: the first reads as many tokens
as the shortest prompt of all ranks has, every other one token, until no rank has an answer to
finish. Where a prompt is longer, its own next token is taken in place of a generated one.
"""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from megatron_llep.integration.no_lending import no_lending


@dataclass(frozen=True, kw_only=True)
class Generations:
    """One answer a prompt."""

    tokens: list[list[int]]
    """Of the answer alone; the last is an end id, unless the answer was cut off."""
    logprobs: list[list[float]]
    """Of each of these tokens, over the model's whole vocabulary, at temperature 1."""
    routing: torch.Tensor | None
    """int16 [b, t, L, K] on the host: the experts of each token that the model has read (all but
    an answer's last one), where asked for."""


def generate(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    greedy: bool = False,
    generator: torch.Generator | None = None,
    uniforms: torch.Tensor | None = None,
    vocab_size: int | None = None,
    record_routing: bool = False,
) -> Generations:
    """Answer the prompts; every rank calls it.

    The ranks of one tensor-parallel group must have the same prompts; other ranks may have others,
    of other lengths and in other number, also none. LLEP lends while prompts are read, and nothing
    after that. Training mode and sequence parallelism are afterwards what they were.

    Args:
        model: the model, or its one chunk, wrapped or not.
        prompts: token ids, at least one each.
        max_new_tokens: an answer is cut off there.
        stop_ids: an answer ends with one of these.
        greedy: take the likeliest token; otherwise sample at temperature 1.
        generator: for sampling, on the CPU; default: torch's.
        uniforms: [b, max_new_tokens] in [0, 1), in place of a generator: an answer then depends on
            its own row alone, whichever rank has it.
        vocab_size: ids from here on, which pad the vocabulary, are never taken.
        record_routing: whether to return the routing; Megatron's `moe_enable_routing_replay` must
            be on.

    Raises:
        ValueError: pipeline parallelism, an empty prompt, or no new tokens.
    """
    model = _unlist(model)
    _check(prompts, max_new_tokens)
    device = torch.cuda.current_device()
    shortest, longest = _agree_on_lengths(prompts, device)
    if longest == 0:  # no rank has a prompt
        return Generations(tokens=[], logprobs=[], routing=None)
    if greedy:
        uniforms = None
    elif uniforms is None:
        shape = (len(prompts), max_new_tokens)
        uniforms = torch.rand(shape, dtype=torch.float64, generator=generator)
    is_real = len(prompts) > 0
    if not is_real:
        # It takes part with a prompt of which nothing is kept.
        prompts = [[0] * shortest]
        uniforms = None
    answers = _Answers(
        prompts,
        is_real=is_real,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        uniforms=uniforms,
        vocab_size=vocab_size,
        device=device,
    )
    context = StaticInferenceContext(len(answers.ids), longest + max_new_tokens)
    routing: list[torch.Tensor] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(as_in_evaluation(model))
        stack.enter_context(_without_sequence_parallelism(model))
        stack.enter_context(InferenceMode.active())
        if record_routing:
            stack.enter_context(_recording())
        start, end = 0, shortest
        while True:
            positions = torch.arange(start, end, device=device).expand(len(answers.ids), -1)
            logits = model(
                answers.read(start, end),
                positions,
                None,
                inference_context=context,
                runtime_gather_output=True,
            )
            if record_routing:
                routing.append(_take_recorded(len(answers.ids)))
            context.sequence_len_offset = end
            if start == 0:
                stack.enter_context(no_lending(model))
            answers.extend(logits[:, -1].float(), end)
            if not _any_rank(answers.is_unfinished, device):
                break
            start, end = end, end + 1
    return answers.collect(torch.cat(routing, dim=1) if record_routing else None)


class _Answers:
    """Prompts and what has been generated so far, in one table of ids [b, t]."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        is_real: bool,
        max_new_tokens: int,
        stop_ids: Collection[int],
        uniforms: torch.Tensor | None,
        vocab_size: int | None,
        device: Any,
    ):
        self._is_real = is_real
        self._max_new_tokens = max_new_tokens
        self._vocab_size = vocab_size
        self._stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
        self._uniforms = None if uniforms is None else uniforms.to(device, torch.float64)
        lengths = [len(prompt) for prompt in prompts]
        width = max(lengths) + max_new_tokens
        self._lengths = torch.tensor(lengths, device=device)
        self._counts = torch.zeros_like(self._lengths)  # generated tokens
        self._done = torch.full_like(self._lengths, not is_real, dtype=torch.bool)
        rows = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
        self.ids = torch.tensor(rows, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(self.ids.shape, dtype=torch.float64, device=device)

    @property
    def is_unfinished(self) -> torch.Tensor:
        """Bool, on the device: whether an answer goes on."""
        return ~self._done.all()

    def read(self, start: int, end: int) -> torch.Tensor:
        """Ids [b, end - start]; past a rank's own longest answer whatever it ends with."""
        width = self.ids.shape[1]
        return self.ids[:, start:end] if end <= width else self.ids[:, -1:]

    def extend(self, logits: torch.Tensor, end: int) -> None:
        """Take the next token, number `end`, of every answer that goes on, from logits [b, V]."""
        logprobs = torch.log_softmax(logits, dim=-1)
        chosen = self._choose(logprobs)
        picked = logprobs.gather(1, chosen.unsqueeze(1)).squeeze(1).double()
        chosen, picked = _share_within_tensor_parallel(chosen, picked)
        if end >= self.ids.shape[1]:
            return
        is_answer = (self._lengths <= end) & ~self._done
        self.ids[:, end] = torch.where(is_answer, chosen, self.ids[:, end])
        self._logprobs[:, end] = torch.where(is_answer, picked, self._logprobs[:, end])
        self._counts += is_answer
        is_end = torch.isin(chosen, self._stop_ids) | (self._counts == self._max_new_tokens)
        self._done |= is_answer & is_end

    def collect(self, routing: torch.Tensor | None) -> Generations:
        """What was generated."""
        tokens: list[list[int]] = []
        logprobs: list[list[float]] = []
        if self._is_real:
            spans = zip(self._lengths.tolist(), self._counts.tolist(), strict=True)
            ids, values = self.ids.tolist(), self._logprobs.tolist()
            for row, (start, count) in enumerate(spans):
                tokens.append(ids[row][start : start + count])
                logprobs.append(values[row][start : start + count])
        if routing is not None and not self._is_real:
            routing = routing[:0]
        return Generations(tokens=tokens, logprobs=logprobs, routing=routing)

    def _choose(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Ids [b] from logprobs [b, V]."""
        known = logprobs[:, : self._vocab_size]
        if self._uniforms is None:
            return known.argmax(dim=-1)
        # The inverse of the distribution function, in float64: one number decides, so rounding of
        # another layout hardly ever changes an answer.
        cumulated = known.double().exp().cumsum(dim=-1)
        turn = self._counts.clamp(max=self._max_new_tokens - 1).unsqueeze(1)
        draw = self._uniforms.gather(1, turn) * cumulated[:, -1:]
        return (
            torch.searchsorted(cumulated, draw, right=True).squeeze(1).clamp(max=known.shape[1] - 1)
        )


def _unlist(model: torch.nn.Module | Sequence[torch.nn.Module]) -> torch.nn.Module:
    if isinstance(model, torch.nn.Module):
        return model
    if len(model) > 1:
        raise ValueError(
            "--num-layers-per-virtual-pipeline-stage: generation needs the whole model on every "
            "rank; leave the flag out"
        )
    return model[0]


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if stages > 1:
        raise ValueError(
            f"--pipeline-model-parallel-size {stages}: generation needs the whole model on every "
            "rank; use 1, with more tensor or expert parallelism"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: give 1 or more")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {number} has no tokens, so there is nothing to go on from")


def _agree_on_lengths(prompts: Sequence[Sequence[int]], device: Any) -> tuple[int, int]:
    """The shortest and the longest prompt of all ranks; 0 where none has any."""
    lengths = [len(prompt) for prompt in prompts]
    no_prompt = torch.iinfo(torch.int64).min
    ends = [-min(lengths), max(lengths)] if lengths else [no_prompt, 0]
    table = torch.tensor(ends, dtype=torch.int64, device=device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    shortest, longest = table.tolist()
    return -shortest, longest


def _any_rank(flag: torch.Tensor, device: Any) -> bool:
    """Whether the flag is set on some rank of the world: they share forwards."""
    table = flag.to(torch.int32).reshape(1)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return bool(table.item())


def _share_within_tensor_parallel(
    chosen: torch.Tensor, logprobs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the first rank: the others' logits may round differently behind MoE layers."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return chosen, logprobs
    table = torch.stack((chosen.double(), logprobs))  # ids are exact in float64
    dist.broadcast(table, src=parallel_state.get_tensor_model_parallel_src_rank(), group=group)
    return table[0].long(), table[1]


@contextlib.contextmanager
def as_in_evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module is in the mode it was in."""
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training:
            module.training = training


@contextlib.contextmanager
def _without_sequence_parallelism(model: torch.nn.Module) -> Iterator[None]:
    """Every rank has all tokens: one token is not to be cut in parts.

    Megatron's `set_model_to_sequence_parallel` does the same, but sets all to one value when it
    goes back, also what was off before.
    """
    attributes = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
    changed: list[tuple[Any, str]] = []
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            for name in attributes:
                if getattr(owner, name, False) is True:
                    setattr(owner, name, False)
                    changed.append((owner, name))
    try:
        yield
    finally:
        for owner, name in changed:
            setattr(owner, name, True)


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    try:
        yield
    finally:
        RouterReplay.clear_global_router_replay_action()
        RouterReplay.clear_global_indices()


def _take_recorded(num_prompts: int) -> torch.Tensor:
    """Routing of the last forward, [b, s, L, K]: Megatron has rows [s * b, K] of each layer."""
    layers = torch.stack(RouterReplay.get_recorded_data(), dim=1)  # [s * b, L, K]
    rows = layers.reshape(-1, num_prompts, *layers.shape[1:])
    return rows.transpose(0, 1).to("cpu", torch.int16)
