"""LLEP trains as plain expert parallelism does: losses, norms and every gradient."""

import pytest
from support.comparison import assert_same_run
from support.layout import Layout
from support.ranks import run_ranks
from support.routing import PATTERNS, Routing
from support.training import Run, train

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.convert import convert_model, with_llep
from megatron_llep.metrics import METRICS, LLEPMetricsTracker

LAYOUTS = [
    Layout(ep=2),
    Layout(ep=4),
    Layout(tp=2, ep=2, etp=1),
    Layout(tp=2, ep=2, etp=2),
    Layout(pp=2, ep=2),
    Layout(ep=2, dp=4),
]
# Lends whenever the ranks' loads differ at all.
EAGER = LLEPConfig(imbalance_threshold=1.0, min_tokens_per_gemm=1)


def train_both(rank: int, size: int, run: Run, llep: LLEPConfig):
    """Train twice in one process group: unmodified Megatron, then with LLEP."""
    plain = train(run)
    lent: list[int] = []
    with_loans = train(
        run, transform_model=lambda chunks: convert_model(chunks, llep), observe=count_lent(lent)
    )
    return plain, with_loans
