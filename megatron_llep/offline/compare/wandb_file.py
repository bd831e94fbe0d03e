"""Scalars of one wandb run, from the `.wandb` file that a run writes before anything is synced.

The file is a log of LevelDB's format: a header of 7 bytes, then blocks of 32 KiB of fragments,
each with checksum (4 bytes), length (2) and type (1: whole, 2: first, 3: middle, 4: last). A
record is a protobuf message of wandb's own.
"""

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_llep.offline.compare.run_log import Session

MAGIC = b":W&B"
HEADER, BLOCK = 7, 32 * 1024
_FRAGMENT = struct.Struct("<IHB")
_WHOLE, _LAST = 1, 4


def read_wandb_file(path: Path) -> Session:
    """Read a file `run-*.wandb`; one that a run is still writing is read as far as it is.

    Raises:
        ImportError: wandb is missing; says how to get it.
        ValueError: it is no such file.
    """
    try:
        from wandb.proto import wandb_internal_pb2
    except ImportError as error:
        raise ImportError("wandb logs need wandb: pip install 'megatron-llep[wandb]'") from error
    rows = defaultdict(list)
    for data in read_records(path):
        record = wandb_internal_pb2.Record.FromString(data)  # type: ignore[attr-defined]
        if record.WhichOneof("record_type") != "history":
            continue
        items = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        if "_step" not in items or "_timestamp" not in items:
            continue
        for key, value in items.items():
            if not key.startswith("_") and isinstance(value, int | float):
                rows[key].append((items["_step"], value, items["_timestamp"]))
    return Session(path.parent, {key: np.array(each, dtype=float) for key, each in rows.items()})


def read_records(path: Path) -> Iterator[bytes]:
    """The records of the log; a last one that is cut off is left out.

    Raises:
        ValueError: the file is none of wandb's.
    """
    data = path.read_bytes()
    if not data.startswith(MAGIC):
        raise ValueError(f"{path} is no wandb run: it does not begin with {MAGIC.decode()}")
    position, record = HEADER, b""
    while position + _FRAGMENT.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < _FRAGMENT.size:  # too little for a fragment: padding
            position += left
            continue
        _, length, kind = _FRAGMENT.unpack_from(data, position)
        position += _FRAGMENT.size
        if kind == 0 or position + length > len(data):
            return
        record += data[position : position + length]
        position += length
        if kind in (_WHOLE, _LAST):
            yield record
            record = b""
