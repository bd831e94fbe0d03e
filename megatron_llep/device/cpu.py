"""Real Megatron on a machine without a GPU: torch's CUDA entry points get CPU meanings.

Megatron-core asks torch for CUDA streams, devices, random state and tensors by name. With those
answered by the CPU, and gloo for communication, it trains as it is. ``torch.cuda.is_available()``
stays False. Not possible there: Megatron's attention under context parallelism, FP8, CUDA graphs,
DeepEP.
"""

import importlib
import importlib.util
import os
import sys
from typing import Literal

import torch

from megatron_llep.device.collectives import install_collectives
from megatron_llep.device.memory import install_memory_statistics
from megatron_llep.device.random_state import install_random_state
from megatron_llep.device.streams import CpuStream, install_streams
from megatron_llep.device.tensors import install_tensors


def is_cpu_device_installed() -> bool:
    """Whether torch's CUDA entry points have CPU meanings in this process."""
    return torch.cuda.Stream is CpuStream


def use_cpu_if_no_gpu() -> Literal["cuda", "cpu"]:
    """Choose where Megatron runs: on the GPUs, untouched, or else on the CPU.

    Call it before Megatron is imported.

    Returns:
        ``"cuda"`` where torch sees a GPU (nothing is changed), else ``"cpu"``.

    Raises:
        RuntimeError: as :func:`install_cpu_device`.
    """
    if torch.cuda.is_available():
        return "cuda"
    install_cpu_device()
    return "cpu"


def install_cpu_device() -> None:
    """Give torch's CUDA entry points CPU meanings, for the rest of this process.

    A second call does nothing. Rank 0 (the variable ``RANK``, if any) says so in one line.

    Raises:
        RuntimeError: a GPU is visible; Megatron is already imported; triton is missing.
    """
    if is_cpu_device_installed():
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            "install_cpu_device() was called where torch sees a GPU. Use "
            "use_cpu_if_no_gpu(), which leaves GPUs alone, or hide them with "
            "CUDA_VISIBLE_DEVICES=''."
        )
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before the CPU device was installed, so it holds CUDA "
            "functions that fail here. Call megatron_llep.device.use_cpu_if_no_gpu() before the "
            "first import of megatron."
        )
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            "megatron-core imports triton even where no GPU is, and it is not installed. "
            "Run: pip install triton"
        )
    # torch's optimizers import it later, and then it trips over functions replaced below.
    importlib.import_module("torch._dynamo")
    install_streams()
    install_memory_statistics()
    install_random_state()
    install_tensors()
    install_collectives()
    # Megatron demands this of tensor parallelism on older GPUs; no CPU reads it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if os.environ.get("RANK", "0") == "0":
        print(
            "megatron_llep: no GPU found; Megatron runs on the CPU "
            "(torch.cuda is answered by the CPU, communication by gloo)",
            flush=True,
        )
