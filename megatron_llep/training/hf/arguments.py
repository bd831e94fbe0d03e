"""The flags `--hf-load`, `--hf-save` and `--hf-config`, and what is refused of them."""

import argparse
import importlib.util
import os
import tempfile
from argparse import Namespace
from pathlib import Path

from megatron_llep.compat.refusals import refuse_hf
from megatron_llep.training.hf.config_file import read_config
from megatron_llep.training.hf.shape import shape_of
from megatron_llep.training.hf.weight_files import check_against_config, list_tensors

_PACKAGES = {
    "transformers": "pip install 'megatron-llep[hf]'",
    "safetensors": "pip install 'megatron-llep[hf]'",
    "megatron.bridge": "bash tools/install_hf.sh .venv (pip install --no-deps megatron-bridge)",
}


def add_hf_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags to a parser: Megatron's `extra_args_provider`."""
    group = parser.add_argument_group(title="Hugging Face checkpoints")
    group.add_argument(
        "--hf-load",
        metavar="FOLDER",
        help="start from this Hugging Face model: the shape comes from its config.json, the "
        "weights from its *.safetensors. A checkpoint that --load finds goes before.",
    )
    group.add_argument(
        "--hf-save",
        metavar="FOLDER",
        help="after training, write the model to this new folder as transformers loads it",
    )
    group.add_argument(
        "--hf-config",
        metavar="FOLDER",
        help="without --hf-load: the folder whose config.json gives the shape, and whose "
        "config.json and tokenizer --hf-save copies",
    )
    return parser


def hf_source(load: str | None, config: str | None) -> tuple[str, Path] | None:
    """The flag and folder that describe the model, if the command line names any.

    Raises:
        ValueError: it names two.
    """
    if load is not None and config is not None:
        raise ValueError(
            f"--hf-config {config}: the model is that of --hf-load {load}; give one of the two"
        )
    if load is not None:
        return "--hf-load", Path(load)
    return None if config is None else ("--hf-config", Path(config))


def check_hf_arguments(args: Namespace) -> None:
    """Refuse what cannot work, before any process group exists; every rank calls it.

    Args:
        args: Megatron's, parsed and completed by `flags_from_hf`.

    Raises:
        ValueError: names the flag, its value and the way out.
    """
    source = hf_source(args.hf_load, args.hf_config)
    if args.hf_save is not None and source is None:
        raise ValueError(
            f"--hf-save {args.hf_save}: the folder needs a config.json and a tokenizer; name a "
            "folder that has them with --hf-config (or start from one with --hf-load)"
        )
    if source is None:
        return
    flag, folder = source
    refuse_hf(flag, folder)
    config = read_config(flag, folder)
    shape = shape_of(config)
    _check_packages(flag, folder)
    _check_layout(args, flag, folder, config.model_type)
    if args.hf_load is not None:
        if args.pretrained_checkpoint is not None:
            raise ValueError(
                f"--hf-load {folder}: --pretrained-checkpoint {args.pretrained_checkpoint} would "
                "replace its weights; give one of the two"
            )
        check_against_config(flag, folder, list_tensors(flag, folder), config, shape)
    if args.hf_save is not None:
        _check_target(Path(args.hf_save))


def _check_packages(flag: str, folder: Path) -> None:
    for package, install in _PACKAGES.items():
        if not _is_installed(package):
            raise ValueError(
                f"{flag} {folder}: {package.replace('megatron.bridge', 'megatron-bridge')} is not "
                f"installed; install it: {install}"
            )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _check_layout(args: Namespace, flag: str, folder: Path, model_type: str) -> None:
    expert_tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    if model_type == "gpt_oss" and expert_tensor > 1:
        raise ValueError(
            f"--expert-tensor-parallel-size {expert_tensor}: megatron-bridge cannot cut the "
            "experts of gpt-oss; set it to 1"
        )
    for name in ("use_megatron_fsdp", "use_torch_fsdp2", "init_model_with_meta_device"):
        if getattr(args, name):
            raise ValueError(
                f"--{name.replace('_', '-')}: {flag} {folder} needs whole parameters on each "
                "rank; leave the flag out"
            )


def _check_target(folder: Path) -> None:
    """The folder is new or empty, and rank 0, which writes it, can."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--hf-save {folder}: this is a file; name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"--hf-save {folder}: the folder is not empty, and nothing in it is overwritten; name "
            "a new one, or delete it"
        )
    if int(os.environ.get("RANK", "0")) != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"--hf-save {folder}: the folder cannot be written ({error}); name another"
        ) from error
