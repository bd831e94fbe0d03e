"""Which device Megatron runs on, and how it runs where no GPU is.

A launcher calls :func:`use_cpu_if_no_gpu` before anything imports Megatron, and
:func:`prepare_megatron_training` before it calls ``megatron.training.pretrain``.
"""

from megatron_llep.device.cpu import (
    install_cpu_device,
    is_cpu_device_installed,
    use_cpu_if_no_gpu,
)
from megatron_llep.device.megatron_training import prepare_megatron_training

__all__ = [
    "install_cpu_device",
    "is_cpu_device_installed",
    "prepare_megatron_training",
    "use_cpu_if_no_gpu",
]
