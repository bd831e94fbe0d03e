"""The folder of a recording, before anything is written to it."""

import re
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_llep.offline.recording.layout import INFO_KEY, RecordingInfo


def list_pieces(folder: Path) -> list[Path]:
    """All whole pieces, those of later runs last."""
    return sorted(folder.glob("*-*.parquet"))


def check_writable(folder: Path) -> None:
    """Make the folder, and try to write there.

    Raises:
        ValueError: it cannot be written to; names the way out.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")
    except OSError as error:
        raise ValueError(
            f"--moe-llep-record {folder}: {error.strerror}; give a folder that every rank can "
            "write to"
        ) from error


def find_last_step(folder: Path, info: RecordingInfo | None = None) -> int:
    """The last step of the run that wrote there last; -1 where nobody did.

    Args:
        folder: of a recording, or still empty.
        info: of a run that is to go on there; None: of any.

    Raises:
        ValueError: a piece cannot be read, or is of another run than `info`.
    """
    newest = {path.stem.partition("-")[2]: path for path in list_pieces(folder)}
    last = -1
    for path in newest.values():
        try:
            file = pq.ParquetFile(path)
            found = RecordingInfo.decode((file.schema_arrow.metadata or {})[INFO_KEY])
            steps = file.read(columns=["step"])["step"]
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"--moe-llep-record {folder}: {path.name} there is no piece of a recording "
                f"({error}); remove it, or give another folder"
            ) from error
        if info is not None and found.sizes != info.sizes:
            raise ValueError(
                f"--moe-llep-record {folder}: another run was recorded there, of {found.sizes} "
                f"ranks, experts, experts a token and layers, not {info.sizes}; give each run a "
                "folder of its own"
            )
        last = max([last, *steps.to_pylist()])
    return last


def find_next_number(folder: Path) -> int:
    """Above those of all pieces that are there."""
    numbers = [int(match[1]) for p in list_pieces(folder) if (match := re.match(r"(\d+)-", p.name))]
    return max(numbers, default=-1) + 1
