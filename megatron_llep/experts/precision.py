"""Experts for which a file chooses the precision (`--te-precision-config-file`).

Transformer Engine's linears of Megatron enter the recipe that the file chose for them at each call,
so foreign experts, which are computed by the natives' modules, run in it too. It must be one that
LLEP supports.
"""

from collections.abc import Iterator

import torch


def find_chosen_recipes(experts: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """Modules that a file wants quantised, and by which recipe; not those that it wants in bf16."""
    for name, module in experts.named_modules():
        chosen = getattr(module, "te_quant_params", None)
        if chosen is None:
            continue
        for choice in filter(None, (chosen.training_recipe, chosen.evaluation_recipe)):
            recipe = choice.fp8_quantization_recipe or choice.fp4_quantization_recipe
            if recipe is not None:
                yield name, getattr(recipe, "value", recipe)  # as a file has it: text
