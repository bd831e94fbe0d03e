"""verl: its Megatron engines with LLEP.

    actor_rollout_ref.model.external_lib=megatron_llep.integration.verl

verl imports this module, then, where a worker reads the model's configuration, and takes these
engines, as they are for the very vendor of the hardware. `override_transformer_config.llep` has the
settings.
"""

from typing import Any

from megatron_llep.integration.convert import convert_model
from megatron_llep.integration.frameworks import find_seam, missing_seam, take_settings
from megatron_llep.integration.read_metrics import read_metrics
from megatron_llep.integration.release_buffers import release_buffers

_PACKAGE = "verl"
_SETTINGS = "override_transformer_config"

_ENGINES = "verl.workers.engine.megatron.transformer_impl"
_LanguageModel: Any = find_seam(_PACKAGE, _ENGINES, "MegatronEngineWithLMHead")
_ValueModel: Any = find_seam(_PACKAGE, _ENGINES, "MegatronEngineWithValueHead")
_register: Any = find_seam(_PACKAGE, "verl.workers.engine.base", "EngineRegistry", "register")
_vendor: str = find_seam(_PACKAGE, "verl.utils.device", "get_vendor")()

for _base in (_LanguageModel, _ValueModel):
    for _name in (
        "_build_tf_config",
        "_build_megatron_module",
        "train_batch",
        "get_per_tensor_param",
    ):
        if not hasattr(_base, _name):
            raise missing_seam(_PACKAGE, f"{_base.__name__}.{_name}")


class _WithLLEP:
    """What is added to an engine of verl's, and stands before it among the bases."""

    def _build_tf_config(self) -> None:
        # verl hands these on to Megatron-Bridge, which refuses what it does not know.
        config = self.engine_config  # type: ignore[attr-defined]
        given = config.override_transformer_config
        known = dict(given)
        self.llep = take_settings(known, _SETTINGS)
        object.__setattr__(config, _SETTINGS, known)  # it is frozen
        try:
            super()._build_tf_config()  # type: ignore[misc]
        finally:
            object.__setattr__(config, _SETTINGS, given)

    def _build_megatron_module(self) -> Any:
        # It has its adapters and weights, and is wrapped; parameters stay as they are.
        return convert_model(super()._build_megatron_module(), self.llep)  # type: ignore[misc]

    def train_batch(self, data: Any, loss_function: Any) -> Any:
        output = super().train_batch(data, loss_function)  # type: ignore[misc]
        metrics = read_metrics()  # all ranks
        if self.is_mp_src_rank_with_outputs():  # type: ignore[attr-defined]
            # A list, as of micro-batches: verl puts the ranks' together and reduces them.
            output["metrics"].update({name: [value] for name, value in metrics.items()})
        return output

    def get_per_tensor_param(self, *args: Any, **kwargs: Any) -> Any:
        release_buffers(self.module)  # type: ignore[attr-defined]
        return super().get_per_tensor_param(*args, **kwargs)  # type: ignore[misc]


# verl looks for (device, vendor) before it takes the engine of the device alone, so this needs no
# VERL_ENGINE_VENDOR; one that asks for "llep" gets the same. Other devices have other engines.
_where = {"backend": "megatron", "device": "cuda", "vendor": sorted({_vendor, "llep"})}


@_register(model_type="language_model", **_where)
class LLEPEngineWithLMHead(_WithLLEP, _LanguageModel):
    """verl's engine for language models, with LLEP."""


@_register(model_type="value_model", **_where)
class LLEPEngineWithValueHead(_WithLLEP, _ValueModel):
    """verl's engine for critics, with LLEP."""
