"""A training script's run: flags, model, Megatron's loop. The scripts say only what differs."""

import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.training import set_startup_timestamps

from megatron_llep.compat.training import train
from megatron_llep.device import is_cpu_device_installed
from megatron_llep.lending.progress import Progress
from megatron_llep.training.arguments import read_arguments
from megatron_llep.training.cpu_flags import flags_without_gpu
from megatron_llep.training.errors import tell_place
from megatron_llep.training.hf.arguments import add_hf_arguments, check_hf_arguments
from megatron_llep.training.hf.flags import flags_from_hf
from megatron_llep.training.hf.install import install_hf
from megatron_llep.training.model import build_model_config
from megatron_llep.training.model_kind import check_kind
from megatron_llep.training.peak_memory import report_peak_memory

FlagSource = Callable[[Sequence[str]], list[str]]
"""From the command line without the program's name: the flags to add to it."""


def _add_nothing(parser: ArgumentParser) -> ArgumentParser:
    return parser


def _return_nothing(args: Namespace) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one script does within Megatron's loop."""

    build_datasets: Callable[..., Any] | None
    """Megatron's dataset provider; None where the loop makes its own data."""
    forward_step: Callable[..., Any]
    check: Callable[[Namespace], None]
    """Refuses arguments as given, before Megatron validates them."""
    add_arguments: Callable[[ArgumentParser], ArgumentParser] = _add_nothing
    """The script's own flags."""
    flag_sources: Sequence[tuple[str, FlagSource]] = field(default=())
    """Flags that follow from others, each with the reason that is printed."""
    is_hybrid: bool = False
    """Whether it trains hybrid models (`--hybrid-layer-pattern`), and not GPT models."""
    loop_options: Callable[[Namespace], dict[str, Any]] = _return_nothing
    """More keywords for `megatron.training.pretrain`, from validated arguments."""


def run(job: Job, *, started: float) -> None:
    """Read `sys.argv` and train.

    Args:
        job: what to train.
        started: `time.time()` when the process began.

    Raises:
        ValueError: the command line asks for what cannot be done; before any process group exists.
    """
    sources = [("the Hugging Face model", flags_from_hf), *job.flag_sources]
    if is_cpu_device_installed():
        sources.append(("no GPU", flags_without_gpu))
    for reason, find_flags in sources:
        added = find_flags(sys.argv[1:])
        sys.argv += added
        if added and int(os.environ.get("RANK", "0")) == 0:
            print(f"{reason}: added {' '.join(added)}", flush=True)

    def add_arguments(parser: ArgumentParser) -> ArgumentParser:
        return job.add_arguments(add_hf_arguments(parser))

    def check(args: Namespace) -> None:
        check_kind(args, hybrid=job.is_hybrid)
        check_hf_arguments(args)
        job.check(args)

    args, llep = read_arguments(add_arguments, check)
    progress = Progress()
    model_config = build_model_config(args, llep, progress)
    save_hf = install_hf(model_config, args)

    set_startup_timestamps(program_start=started, main_entry=time.time())
    with tell_place(args, progress):
        train(args, model_config, job.build_datasets, job.forward_step, **job.loop_options(args))
    save_hf()
    report_peak_memory()
