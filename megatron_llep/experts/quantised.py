"""Experts whose parameters are quantised (`--fp8-param-gather`), and which of them can be lent.

What is lent are numbers in bf16 or fp32, which the borrower quantises as it does for experts with
ordinary parameters. It must get the numbers that the home computes with. With scales that are
powers of two, in blocks that rows and columns share, it does: E4M3's 4 significant bits are exact
in bf16, and the block's scale is found again, or one that is larger by a power of two, as far as
the largest number allows; all numbers of the block are E4M3 under that one as well.
`docs/gpu.md` says why this is not so for other recipes.
"""

import torch
from megatron.core.fp8_utils import is_float8tensor


def check_restorable(experts: torch.nn.Module) -> None:
    """Refuse quantised parameters that a borrower would compute with other numbers for.

    Raises:
        ValueError: names the weight, what is wrong with it, and the way out.
    """
    for name, weight in experts.named_parameters():
        if not is_float8tensor(weight):
            continue
        if not getattr(weight._quantizer, "force_pow_2_scales", False):
            raise ValueError(
                f"--fp8-param-gather: the scales of experts.{name} need not be powers of two, and "
                "a borrower could not restore its numbers; use --fp8-recipe blockwise without "
                "NVTE_FP8_BLOCK_SCALING_FP32_SCALES, or leave the flag out"
            )
        if weight.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f"--fp8-param-gather: {weight.dtype} does not hold all numbers of experts.{name}; "
                "use --bf16, or leave the flag out"
            )
