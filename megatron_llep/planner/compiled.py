"""The loops of `planner.loops`, compiled once for a machine.

The machine code lies beside the loops or, where nothing can be written there, in the user's cache
folder; `NUMBA_CACHE_DIR` names another place. It lies in a folder of its own for each text of the
loops, numba and CPU. So no code outlives what it was compiled from, and processes that compile at
once write the same files, each in one piece.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

NOT_CACHED = (
    "the planners were compiled for this run alone, as no folder for their machine code can be "
    "written: let NUMBA_CACHE_DIR name one"
)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """Compiled functions, as in the modules of `planner.loops`. Arrays are int64, C-contiguous."""

    plan_counts: Callable[..., Any]
    read_quotas: Callable[..., Any]
    spread_tokens: Callable[..., Any]
    stay_in_row: Callable[..., Any]
    keep_own_replicas: Callable[..., Any]
    count_sends: Callable[..., Any]
    count_receives: Callable[..., Any]
    list_exchange: Callable[..., Any]
    is_cached: bool
    """Whether the next process finds them."""


@cache
def compile_planners() -> Compiled:
    """Compile what the planners run, or load it: some seconds, or a fraction of one.

    Called by `convert_model` and `with_llep`, so that no training step waits for it; else the
    first plan does. With `NUMBA_DISABLE_JIT=1` the loops run as plain Python.
    """
    import numba
    from numba.core.types import Array, boolean, float64, int64

    from megatron_llep.planner.loops import assignment, exchange, plan, replicas

    row, table = (Array(int64, ndim, "C", readonly=True) for ndim in (1, 2))
    options = (int64, int64, int64, boolean, float64, int64, float64, float64, boolean)
    signatures = {
        plan.plan_counts: (table, *options),
        plan.read_quotas: (table,),
        replicas.spread_tokens: (table, row, int64, boolean),
        replicas.stay_in_row: (table, int64),
        replicas.keep_own_replicas: (table, table, table, int64),
        assignment.count_sends: (table, table, table, int64, int64, boolean),
        assignment.count_receives: (table, table, table, int64, int64, boolean),
        exchange.list_exchange: (table, table, table, table, int64, int64, int64, boolean),
    }
    functions = {function.__name__: function for function in signatures}
    if numba.config.DISABLE_JIT:
        return Compiled(**functions, is_cached=True)
    folder = _find_folder()
    if folder is not None:
        chosen = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(folder)  # read where caching is enabled
        try:
            for function in signatures:
                function.enable_caching()
        finally:
            numba.config.CACHE_DIR = chosen
    for function, signature in signatures.items():
        try:
            function.compile(signature)
        except OSError:  # the disk is full
            folder = None
            functions[function.__name__] = numba.njit(signature)(function.py_func)
        # Arguments of other types are an error, rather than seconds in a training step.
        functions[function.__name__].disable_compile()
    return Compiled(**functions, is_cached=folder is not None)


def _find_folder() -> Path | None:
    """A folder for this machine code that can be written; None if there is none."""
    import llvmlite.binding as llvm
    import numba

    loops = Path(__file__).parent / "loops"
    made_of = [path.read_bytes() for path in sorted(loops.glob("*.py"))]
    features = llvm.get_host_cpu_features().flatten()
    made_of += [f"{numba.__version__} {llvm.get_host_cpu_name()} {features}".encode()]
    name = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
    places = [loops / "__pycache__", Path(os.path.expanduser("~/.cache/megatron_llep"))]
    if numba.config.CACHE_DIR:
        places = [Path(numba.config.CACHE_DIR)]
    for place in places:
        if not place.is_absolute() and not numba.config.CACHE_DIR:
            continue  # there is no home
        try:
            (place / name).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place / name).close()
        except OSError:
            continue
        return place / name
    return None
