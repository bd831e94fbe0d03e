"""Where the ranks of a training command run, and the environment they run in."""

import os
from dataclasses import dataclass

from megatron_llep.offline.launch.torchrun import count_gpus


@dataclass(frozen=True, kw_only=True)
class Device:
    """`name` is cpu or gpu; `note` says why, when it is no obvious choice."""

    name: str
    note: str | None

    def environment(self) -> dict[str, str]:
        """The environment of a training command."""
        # Logs are read while runs go on; runs never reach out to a wandb server unasked.
        wanted = {"PYTHONUNBUFFERED": "1", "WANDB_SILENT": "true"}
        wanted["WANDB_MODE"] = os.environ.get("WANDB_MODE", "offline")
        if self.name == "cpu":
            wanted |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return {**os.environ, **wanted}


def choose_device(world_size: int, gpu_count: int, cores: int) -> Device:
    """GPUs when there is one for each rank, else the CPU, saying so."""
    if gpu_count >= world_size:
        return Device(name="gpu", note=None)
    notes = []
    if gpu_count:
        notes.append(
            f"{world_size} ranks need {world_size} GPUs and this machine has {gpu_count}: "
            "running on the CPU over gloo"
        )
    if world_size > cores:
        notes.append(
            f"{world_size} ranks share {cores} cores: step times say nothing about balance here"
        )
    return Device(name="cpu", note="; ".join(notes) or None)


def take_device(world_size: int, layout: str = "") -> Device:
    """Choose what this machine has, and say so; `layout` goes beside the number of ranks."""
    device = choose_device(world_size, count_gpus(), len(os.sched_getaffinity(0)))
    ranks = f"{world_size} ranks{layout and f', {layout},'}"
    print(f"{ranks} on the {device.name.upper()}", flush=True)
    if device.note:
        print(f"note: {device.note}", flush=True)
    return device
