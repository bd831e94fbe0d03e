"""Scalars of one TensorBoard event file."""

import struct
from collections import defaultdict
from pathlib import Path

import numpy as np

from megatron_llep.offline.compare.run_log import Session


def read_event_file(path: Path) -> Session:
    """Read a file `events.out.tfevents.*`; one that a run is still writing is read as far as it is.

    Raises:
        ImportError: tensorboard is missing; says how to get it.
    """
    try:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    except ImportError as error:
        raise ImportError(
            "TensorBoard logs need tensorboard: pip install 'megatron-llep[train]'"
        ) from error
    rows = defaultdict(list)
    for event in LegacyEventFileLoader(str(path)).Load():
        for value in event.summary.value:
            number = _read_number(value)
            if number is not None:
                rows[value.tag].append((event.step, number, event.wall_time))
    return Session(path.parent, {tag: np.array(each, dtype=float) for tag, each in rows.items()})


def _read_number(value) -> float | None:
    """A scalar as writers of old and new kinds put it; None if the value is something else."""
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return value.simple_value
    if kind == "tensor" and value.metadata.plugin_data.plugin_name == "scalars":
        if value.tensor.float_val:
            return value.tensor.float_val[0]
        return struct.unpack("<f", value.tensor.tensor_content[:4])[0]
    return None
