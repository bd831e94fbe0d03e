"""All tests run on the CPU, also where GPUs are, unless pytest is run with ``-m gpu``."""

import fcntl
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

_GPU_FILES = pytest.StashKey[set[Path]]()


def pytest_configure(config: pytest.Config) -> None:
    """Choose the device before a test module can import Megatron."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if config.option.markexpr == "gpu":
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron_llep.device import use_cpu_if_no_gpu

        use_cpu_if_no_gpu()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Note which files have tests that need a GPU; before any of them is deselected."""
    if item.get_closest_marker("gpu"):
        item.config.stash.setdefault(_GPU_FILES, set()).add(item.path)


@pytest.fixture
def gpu_files(pytestconfig: pytest.Config) -> set[Path]:
    """Files of this run that have tests marked `gpu`."""
    return pytestconfig.stash.get(_GPU_FILES, set())


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """In this process, before ranks are forked: together they would compile the same.

    Of two processes that run tests each compiles half, and loads the other's.
    """
    from megatron_llep.planner import compile_planners
    from megatron_llep.planner.compiled import compiled

    halves = {
        "nodes": lambda: compiled("planners.nodes"),
        "rest": lambda: compile_planners(nodes=False),
    }
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    base = tmp_path_factory.getbasetemp()
    for name in sorted(halves, reverse=worker == "gw1"):
        with (base.parent if worker else base).joinpath(f"compile-{name}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            halves[name]()


@pytest.fixture(autouse=True)
def leave_no_global_arguments() -> Iterator[None]:
    """Files share a process in any order: Megatron's global arguments would reach forked ranks."""
    yield
    found = sys.modules.get("megatron.training.global_vars")
    if found is not None and found._GLOBAL_ARGS is not None:
        found.unset_global_variables()
        pytest.fail("Megatron's global arguments are still set: unset them where they were set")
