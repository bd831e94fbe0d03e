"""What scripts refuse with an older Megatron."""

from argparse import Namespace

from megatron_llep.compat import MEGATRON

_WAY_OUT = "install megatron-core 0.19"


def refuse_packs(args: Namespace) -> None:
    """Refuse packs that this Megatron cannot hand to all ranks of a tensor-parallel group.

    Raises:
        ValueError: names the flag, its value and the way out.
    """
    if MEGATRON >= (0, 19) or args.tensor_model_parallel_size == 1:
        return
    for name in ("micro_batch_size", "eval_micro_batch_size"):
        size = getattr(args, name)
        if (size or 1) > 1:
            raise ValueError(
                f"--{name.replace('_', '-')} {size}: with --tensor-model-parallel-size above 1 "
                "Megatron 0.18 takes one pack at a time; give 1, and a longer --seq-length, or "
                f"{_WAY_OUT}"
            )


def refuse_hybrid(pattern: str) -> None:
    """Refuse hybrid models that this Megatron's loop does not describe.

    Raises:
        ValueError: names the flag, its value and the way out.
    """
    if MEGATRON < (0, 19):
        raise ValueError(
            f"--hybrid-layer-pattern {pattern}: with Megatron 0.18 only scripts of your own train "
            f"hybrid models, by llep_hook; {_WAY_OUT}"
        )


def refuse_latent_attention() -> None:
    """Refuse to complete an older Megatron's multi-latent attention of local layers.

    Raises:
        ValueError: names the flag and the way out.
    """
    if MEGATRON < (0, 19):
        raise ValueError(
            "--multi-latent-attention: with Megatron 0.18 it needs Transformer Engine; leave the "
            f"flag out, or {_WAY_OUT}"
        )


def refuse_hf(flag: str, folder: object) -> None:
    """Refuse Hugging Face models where megatron-bridge does not fit Megatron.

    Raises:
        ValueError: names the flag, its value and the way out.
    """
    if MEGATRON < (0, 19):
        raise ValueError(
            f"{flag} {folder}: the megatron-bridge that converts it does not run on Megatron 0.18; "
            f"{_WAY_OUT}"
        )
