"""Megatron-Bridge: LLEP in its `pretrain` and `finetune`, by one callback.

pretrain(config, forward_step, callbacks=[use_llep(config)])
"""

from typing import Any

import torch

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.convert import convert_model
from megatron_llep.integration.frameworks import KEY, find_seam, missing_seam, settings_from
from megatron_llep.integration.read_metrics import read_metrics

_PACKAGE = "megatron-bridge"


def use_llep(config: Any, llep: LLEPConfig | None = None) -> "LLEPCallback":
    """Switch LLEP on for the model of a Bridge configuration.

    Call it after YAML files and overrides are applied. Where the recipe has set `config.llep = {}`
    they may give settings, as `llep:` or `+llep.planner=exact`.

    Args:
        config: Bridge's ConfigContainer; its model is a provider or Megatron's ModelConfig.
        llep: settings. Default: `config.llep`, where there is one, else those of LLEPConfig.

    Returns:
        A callback for `pretrain` or `finetune`. It stops a training that would run without LLEP,
        and prints the metrics with Bridge's log lines (TensorBoard, wandb, MLflow and Comet have
        them through Megatron's report).

    Raises:
        ValueError: a setting is none of LLEP's.
        SeamError: this version of Bridge has no hooks or callbacks as they were tried.
    """
    if llep is None:
        llep = settings_from(getattr(config, KEY, None), KEY)
    events = find_seam(_PACKAGE, "megatron.bridge.training.callbacks", "VALID_EVENTS")
    for event in ("on_train_start", "on_train_step_end"):
        if event not in events:
            raise missing_seam(_PACKAGE, f"callback {event}")
    callback = LLEPCallback(llep)
    # Bridge adds adapters in the last hook before the model is wrapped, and theirs is not there
    # yet: with adapters, LLEP comes after it is wrapped.
    _add_hook(config.model, "pre" if getattr(config, "peft", None) is None else "post", callback)
    return callback


class LLEPCallback:
    """Both a hook of Bridge's models and a callback of its training."""

    def __init__(self, llep: LLEPConfig) -> None:
        self.llep = llep
        self._has_run = False

    def __call__(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Convert the model that was built."""
        self._has_run = True
        return convert_model(chunks, self.llep)

    def on_train_start(self, context: Any) -> None:
        """Stop what would train without LLEP."""
        if not self._has_run:
            raise ValueError(
                "use_llep: its hook was lost from config.model before the model was built; call "
                "use_llep after overrides are applied (they empty pre_wrap_hooks), and with the "
                "configuration that is trained"
            )

    def on_train_step_end(self, context: Any) -> None:
        """Print the metrics where Bridge prints a line."""
        step = context.state.train_state.step + 1  # Bridge counts it after this event
        if step % context.state.cfg.logger.log_interval:
            return
        metrics = read_metrics()
        if metrics and torch.distributed.get_rank() == 0:
            values = " | ".join(f"{name}: {value:.2f}" for name, value in metrics.items())
            print(f" iteration {step:8d} | {values}", flush=True)


def _add_hook(model: Any, when: str, hook: LLEPCallback) -> None:
    hooks = getattr(model, f"{when}_wrap_hooks", None)
    register = getattr(model, f"register_{when}_wrap_hook", None)
    if isinstance(hooks, list):
        hooks.append(hook)
    elif callable(register):
        register(hook)
    else:
        raise missing_seam(_PACKAGE, f"{type(model).__name__}.register_{when}_wrap_hook")
