"""From the folder that a run left to what it logged."""

from collections.abc import Sequence
from pathlib import Path

from megatron_llep.offline.compare.run_log import RunLog, join_sessions
from megatron_llep.offline.compare.tensorboard import read_event_file
from megatron_llep.offline.compare.wandb_file import read_wandb_file


def read_run(path: Path | Sequence[Path], name: str | None = None) -> RunLog:
    """Read what a run logged to TensorBoard or, where it has no such log, to wandb.

    Args:
        path: a folder, with event files or `.wandb` files in it or in folders below it, or one
            such file; several paths are the phases of one run, as several folders below one are.
        name: for people; default: the folder's.

    Returns:
        All scalars, sessions joined; see `join_sessions`.

    Raises:
        ValueError: no such folder, no log in it, or the logs of several runs.
    """
    paths = [path] if isinstance(path, Path) else list(path)
    source = ", ".join(map(str, paths))
    events = [file for each in paths for file in _find(each, "*tfevents*")]
    sessions = [read_event_file(file) for file in events]
    if not any(session.rows for session in sessions):
        sessions = [read_wandb_file(file) for each in paths for file in _find(each, "*.wandb")]
        if not events and not sessions:
            raise ValueError(
                f"{source}: no TensorBoard event file (*tfevents*) and no wandb run (*.wandb) in "
                "it or below; give the folder that --tensorboard-dir or --wandb-save-dir named"
            )
    return join_sessions(sessions, name or paths[0].resolve().name, source)


def _find(path: Path, pattern: str) -> list[Path]:
    """Files of the pattern, the path itself or below it.

    Raises:
        ValueError: there is no such path.
    """
    if path.is_file():
        return [path] if path.match(pattern) else []
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    return sorted(file for file in path.rglob(pattern) if file.is_file())
