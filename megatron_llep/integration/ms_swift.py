"""ms-swift: LLEP in its Megatron trainers, by a callback.

A plugin file, for `--external_plugins plugin.py --callbacks llep`:

    from megatron_llep.integration.ms_swift import register

    register()
"""

from functools import partial
from typing import Any

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.convert import convert_model
from megatron_llep.integration.frameworks import KEY, find_seam, missing_seam, settings_from
from megatron_llep.integration.read_metrics import read_metrics
from megatron_llep.integration.release_buffers import release_buffers

_PACKAGE = "ms-swift"


def register(**settings: Any) -> None:
    """Let ms-swift know the callback `llep`, which `--callbacks llep` switches on.

    Args:
        settings: fields of LLEPConfig, such as `planner="exact"`.

    Raises:
        ValueError: a setting is none of LLEP's.
        SeamError: this version of ms-swift has no callbacks as they were tried.
    """
    llep = settings_from(settings, "register")
    callbacks = find_seam(_PACKAGE, "swift.megatron.callbacks", "megatron_callbacks_map")
    base = find_seam(_PACKAGE, "swift.megatron.callbacks.base", "MegatronCallback")
    for event in ("on_log", "on_step_end"):
        if not hasattr(base, event):
            raise missing_seam(_PACKAGE, f"MegatronCallback.{event}")
    kind = type("LLEPCallback", (_Callback, base), {})
    callbacks[KEY] = partial(kind, llep=llep)


class _Callback:
    """What is added to ms-swift's base of callbacks."""

    def __init__(self, trainer: Any, llep: LLEPConfig) -> None:
        super().__init__(trainer)  # type: ignore[call-arg]
        models = getattr(trainer, "unwrapped_models", None)
        if models is None:
            raise missing_seam(_PACKAGE, f"{type(trainer).__name__}.unwrapped_models")
        # It is built, has its adapters and weights, and is wrapped; parameters stay as they are.
        convert_model(models, llep)
        self._models = models

    def on_step_end(self) -> None:
        """Leave nothing in the way of what ms-swift does between steps: it saves, or rolls out."""
        release_buffers(self._models)

    def on_log(self, logs: dict[str, Any]) -> None:
        """Add the metrics, before the callbacks that write `logs` down; all ranks are here."""
        if self._models[0].training:
            logs.update(read_metrics())
