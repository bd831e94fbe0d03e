"""Which kind of model a training script is for: GPT, or hybrid, whose layers follow a pattern."""

from argparse import Namespace

from megatron_llep.compat.refusals import refuse_hybrid
from megatron_llep.device import is_cpu_device_installed
from megatron_llep.integration.hybrid_pattern import read_pattern, refuse_kernels

_HF_FLAGS = ("hf_load", "hf_config", "hf_save")
# What to give --spec, by whether models are hybrid.
_SPECS = {
    False: ["megatron_llep.integration.spec", "gpt_layers_with_llep"],
    True: ["megatron_llep.integration.hybrid_stack", "hybrid_stack_with_llep"],
}


def check_kind(args: Namespace, *, hybrid: bool) -> None:
    """Refuse a model of another kind than the script's.

    Args:
        args: parsed, not yet validated by Megatron.
        hybrid: whether the script trains hybrid models.

    Raises:
        ValueError: names flag, value and way out.
    """
    if args.spec == _SPECS[not hybrid]:
        raise ValueError(
            f"--spec {' '.join(args.spec)}: it is for the other kind of model; give "
            f"{' '.join(_SPECS[hybrid])}"
        )
    pattern = read_pattern(args)
    if not hybrid:
        if pattern is not None:
            raise ValueError(
                f"--hybrid-layer-pattern {pattern}: this script trains GPT models; pretrain with "
                "pretrain/pretrain_hybrid.py, or leave the flag out"
            )
        return
    if pattern is None:
        raise ValueError(
            "--hybrid-layer-pattern is missing: give one symbol a layer, such as *E*E (* attention,"
            " E experts), or use pretrain/pretrain_gpt.py"
        )
    refuse_hybrid(pattern)
    for name in _HF_FLAGS:
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: weights of Hugging Face are "
                "read into GPT models only; leave the flag out, or use pretrain/pretrain_gpt.py"
            )
    for refusal in refuse_kernels(args, has_gpu=not is_cpu_device_installed()):
        raise ValueError(refusal)
