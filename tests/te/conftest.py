"""Tests of Transformer Engine's experts: on the CPU with stand-ins for its kernels."""

import pytest


@pytest.fixture(autouse=True)
def gemms(request, monkeypatch):
    """Replace what calls CUDA, and list every grouped GEMM; on a GPU nothing is replaced."""
    if request.node.get_closest_marker("gpu"):
        return None
    from te_cpu_stand_in import install

    return install(monkeypatch)
