"""Random state of a machine without a GPU: the device's generator is torch's CPU generator.

Operators on CPU tensors draw from that generator, so what Megatron saves, forks and restores as
the state of the GPU must be its state, or recomputed dropout would differ from the first one.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

_TRACKER_LOGGER = "megatron.core.tensor_parallel.random"
_ALWAYS_TRUE_WARNING = "CPU RNG state changed within GPU RNG context"


class _CpuGenerator:
    """Stands for ``torch.cuda.default_generators``: one generator, whatever the index."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _get_state(device: object = "cuda") -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_state(new_state: torch.Tensor, device: object = "cuda") -> None:
    torch.default_generator.set_state(new_state)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _call_now(function: Callable[[], Any], **kwargs: Any) -> None:
    function()


def _is_useful(record: logging.LogRecord) -> bool:
    return record.msg != _ALWAYS_TRUE_WARNING


def install_random_state() -> None:
    """Let ``torch.cuda``'s generator be torch's CPU generator.

    Callbacks that torch would queue until the GPU wakes up run at once: queued, they would be
    lost without a word. Megatron's warning that the CPU state changed while it used the device's
    is dropped, as here the two are one.
    """
    cuda: Any = torch.cuda
    replacements: dict[str, Any] = {
        "get_rng_state": _get_state,
        "set_rng_state": _set_state,
        "get_rng_state_all": lambda: [_get_state()],
        "set_rng_state_all": lambda states: _set_state(next(iter(states))),
        "manual_seed": _seed,
        "manual_seed_all": _seed,
        "initial_seed": torch.default_generator.initial_seed,
    }
    for name, function in replacements.items():
        setattr(cuda, name, function)
        setattr(cuda.random, name, function)
    cuda._lazy_call = _call_now
    cuda.default_generators = _CpuGenerator()
    logging.getLogger(_TRACKER_LOGGER).addFilter(_is_useful)
