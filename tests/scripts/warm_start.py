"""Run a script in ranks forked from this process, as torchrun would start it.

This process has imported torch and Megatron, which takes most of the time of a short run.
"""

import atexit
import contextlib
import io
import os
import runpy
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.training.training import destroy_global_state

from support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import launch  # noqa: E402


def run_warm(
    options: Sequence[str], environment: Mapping[str, str], *, port: int, timeout: float
) -> str:
    """Run the script that tools/launch.py would start with these options.

    Args:
        options: its command line.
        environment: further variables.
        port: a free one, at which the ranks meet.
        timeout: seconds after which the ranks are ended.

    Returns:
        What all ranks printed.

    Raises:
        RankError: a rank raised.
    """
    with contextlib.redirect_stdout(io.StringIO()) as said:
        launch.main([options[0], "--dry-run", *options[1:]])
    words = shlex.split(said.getvalue())
    start = next(at for at, word in enumerate(words) if word.endswith(".py"))
    script, processes = Path(words[start]), int(words[words.index("--nproc-per-node") + 1])

    with tempfile.NamedTemporaryFile() as output:

        def work(rank: int, size: int) -> None:
            atexit._clear()  # the parent's, as are the arguments that its tests have parsed
            destroy_global_state()
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ.update(environment | where)
            os.chdir(ROOT)
            printed = os.open(output.name, os.O_WRONLY | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(printed, stream)
            sys.argv = words[start:]
            sys.path.insert(0, str(script.parent))
            runpy.run_path(str(script), run_name="__main__")
            atexit._run_exitfuncs()

        run_ranks(work, processes, timeout=timeout, in_group=False)  # the script makes one
        return Path(output.name).read_text(errors="replace")
