"""A specification of hybrid models for `--spec`, for scripts that cannot be changed.

torchrun pretrain_hybrid.py ... --spec megatron_llep.integration.hybrid_stack hybrid_stack_with_llep
"""

from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args
from megatron.training.argument_utils import core_transformer_config_from_args

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.arguments import llep_config_from_args
from megatron_llep.integration.convert import with_llep
from megatron_llep.integration.hybrid_spec import LocalHybridStack, build_local_hybrid_spec


class HybridStackWithLLEP:
    """Builds Megatron's stack, with LLEP in its MoE layers.

    Where a script gives a function for the layers of a GPT model, it gives a specification for a
    hybrid model's, which is there before process groups are. LLEP makes its own when the stack of
    a chunk is built. All ranks build one for each chunk.
    """

    def __new__(
        cls, config: TransformerConfig, submodules: HybridStackSubmodules, **kwargs: Any
    ) -> HybridStack:
        """A stack, as `HybridStack` takes its arguments.

        Raises:
            ValueError: as `with_llep`.
        """
        args = get_args()
        llep = llep_config_from_args(args) if hasattr(args, "moe_llep") else LLEPConfig()
        stack = LocalHybridStack if config.transformer_impl == "local" else HybridStack
        return stack(config, submodules=with_llep(submodules, llep), **kwargs)


class _StackSpec(ModuleSpec):
    """Megatron's own layers, or local ones: which, the script's arguments say."""

    @property
    def submodules(self) -> HybridStackSubmodules:
        if get_args().transformer_impl != "local":
            return hybrid_stack_spec.submodules
        return build_local_hybrid_spec(core_transformer_config_from_args(get_args())).submodules

    @submodules.setter
    def submodules(self, value: object) -> None:
        """Leave out what the fields of a specification are set to."""


hybrid_stack_with_llep = _StackSpec(module=HybridStackWithLLEP)
"""For each stack as `with_llep`, by the script's `--moe-llep-*` flags if it knows them, else by
LLEPConfig's defaults. Layers of multi-token prediction, which Megatron builds as stacks of their
own, stay plain: use `convert_model` for these."""
