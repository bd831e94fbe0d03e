"""Hooks of Megatron's model configuration for `--hf-load` and `--hf-save`."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.training.checkpointing import checkpoint_exists
from megatron.training.utils import print_rank_0

from megatron_llep.compat.training import ModelConfig
from megatron_llep.training.hf.arguments import hf_source

Chunks = list[torch.nn.Module]


def install_hf(config: ModelConfig, args: Namespace) -> Callable[[], None]:
    """Let the model start from `--hf-load`; weights are loaded before LLEP's hook and DDP.

    Args:
        config: of the model that is about to be built.
        args: Megatron's, checked by `check_hf_arguments`.

    Returns:
        A function that all ranks call after training; it writes `--hf-save`, if that is given.
    """
    chunks: Chunks = []
    if args.hf_load is not None:
        config.pre_wrap_hooks.insert(0, hf_load_hook(Path(args.hf_load), args))
    source = hf_source(args.hf_load, args.hf_config)
    if args.hf_save is None or source is None:
        return _nothing

    def remember(wrapped: Chunks) -> Chunks:
        chunks[:] = wrapped
        return wrapped

    def save() -> None:
        from megatron_llep.training.hf.save import save_hf

        save_hf(chunks, Path(args.hf_save), source[1], tokenizer=_tokenizer_folder(args))

    config.post_wrap_hooks.append(remember)
    return save


def hf_load_hook(folder: Path, args: Namespace) -> Callable[[Chunks], Chunks]:
    """A hook for the front of `pre_wrap_hooks` that fills the model from a Hugging Face folder.

    It does nothing where `--load` finds a checkpoint, which Megatron loads later.
    """

    def load(chunks: Chunks) -> Chunks:
        # One rank looks: a shared file system may show ranks different states.
        found = [dist.get_rank() == 0 and checkpoint_exists(args.load)]
        dist.broadcast_object_list(found, src=0)
        if found[0]:
            print_rank_0(f"--hf-load {folder}: left alone, --load {args.load} has a checkpoint")
            return chunks
        fill_from_hf(chunks, folder, args)
        return chunks

    return load


def fill_from_hf(chunks: Chunks, folder: Path, args: Namespace) -> None:
    """Fill the unwrapped chunks of a model of Megatron's arguments from a Hugging Face folder.

    All ranks call it.
    """
    # Needs the packages of the extra `hf`.
    from megatron_llep.training.hf.load import load_hf

    load_hf(
        chunks,
        folder,
        tied=not args.untie_embeddings_and_output_weights,
        padded_vocab_size=args.padded_vocab_size,
    )


def _tokenizer_folder(args: Namespace) -> Path | None:
    if args.tokenizer_type != "HuggingFaceTokenizer" or args.tokenizer_model is None:
        return None
    folder = Path(args.tokenizer_model)
    return folder if folder.is_dir() else None


def _nothing() -> None:
    return None
