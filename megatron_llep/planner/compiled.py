"""The loops of `planner.loops`, compiled once for a machine, and each when it is asked for.

The machine code lies beside the loops or, where nothing can be written there, in the user's cache
folder; `NUMBA_CACHE_DIR` names another place. It lies in a folder of its own for each text of the
loops, numba and CPU. So no code outlives what it was compiled from, and processes that compile at
once write the same files, each in one piece.
"""

import hashlib
import importlib
import os
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

# Of the functions' arguments, which all are int64 unless they are floats or bools.
READ, ROW, TABLE, INT, FLOAT, BOOL = range(6)
"""A C-contiguous table that is read; a row, and a table, that may be written to; and numbers."""

FUNCTIONS = {
    "planners.lp": (READ, INT, INT, BOOL, FLOAT, BOOL),
    "planners.exact": (READ, INT, INT, BOOL, FLOAT, BOOL),
    "planners.tolerant": (READ, INT, INT, BOOL, FLOAT, BOOL, FLOAT),
    "planners.nodes": (READ, INT, INT, FLOAT, BOOL, FLOAT, ROW),
    "planners.lla": (READ, INT, INT, BOOL, FLOAT, BOOL, FLOAT, INT),
    "plan.read_quotas": (READ,),
    "assignment.count_sends": (READ, READ, READ, INT, INT, BOOL),
    "assignment.count_receives": (READ, READ, READ, INT, INT, BOOL),
    "exchange.list_exchange": (READ, READ, READ, READ, INT, INT, INT, BOOL),
    "pieces.list_pieces": (READ, INT, INT, INT, INT),
    "chunks.list_rows": (READ,),
    "chunks.place_pairs": (READ, ROW, INT),
    "replicas.spread_tokens": (READ, ROW, INT, BOOL),
    "replicas.stay_in_row": (READ, INT),
    "replicas.keep_own_replicas": (READ, READ, READ, INT),
}
"""Those that may be asked for, and what they take."""

OF_AUTO = ("lp", "exact", "tolerant", "lla")
"""Planners that `auto` runs."""


def compile_planners(
    planners: Iterable[str] = OF_AUTO, *, replicas: bool = True, nodes: bool = True
) -> bool:
    """Compile all that these planners run in a step, or load it: seconds, or part of one.

    `convert_model` and `with_llep` call it, so that no training step waits for it. What else is
    used is compiled when it is.

    Args:
        planners: of `PLANNERS`.
        replicas: whether tokens are spread over replicas.
        nodes: whether there are several.

    Returns:
        Whether the next process finds the machine code.
    """
    wanted = {"exchange.list_exchange", "chunks.list_rows", "chunks.place_pairs"}
    wanted.add("pieces.list_pieces")
    for planner in planners:
        run = OF_AUTO if planner == "auto" else (planner,)
        wanted |= {f"planners.{each}" for each in run}
        if nodes and not {"tolerant", "exact"}.isdisjoint(run):
            wanted.add("planners.nodes")
    if replicas:
        wanted |= {"plan.read_quotas", *(name for name in FUNCTIONS if "replicas." in name)}
    is_cached = [_compile(name)[1] for name in FUNCTIONS if name in wanted]
    return all(is_cached)


@cache
def compiled(name: str) -> Callable[..., Any]:
    """A function of `FUNCTIONS`; with `NUMBA_DISABLE_JIT=1` it runs as plain Python."""
    return _compile(name)[0]


@cache
def _compile(name: str) -> tuple[Callable[..., Any], bool]:
    """The function, and whether its machine code is kept."""
    import numba
    from numba.core.types import Array, boolean, float64, int64

    room, _, own_name = name.partition(".")
    function = getattr(importlib.import_module(f"megatron_llep.planner.loops.{room}"), own_name)
    if numba.config.DISABLE_JIT:
        return function, True
    types = {
        READ: Array(int64, 2, "C", readonly=True),
        ROW: Array(int64, 1, "C"),
        TABLE: Array(int64, 2, "C"),
        INT: int64,
        FLOAT: float64,
        BOOL: boolean,
    }
    signature = tuple(types[kind] for kind in FUNCTIONS[name])
    folder = _find_folder()
    if folder is not None:
        chosen = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(folder)  # read where caching is enabled
        try:
            function.enable_caching()
        finally:
            numba.config.CACHE_DIR = chosen
    try:
        function.compile(signature)
    except OSError:  # the disk is full
        folder = None
        function = numba.njit(signature)(function.py_func)
    # Arguments of other types are an error, rather than seconds in a training step.
    function.disable_compile()
    return function, folder is not None


@cache
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
