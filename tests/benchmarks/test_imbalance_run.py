"""The imbalance benchmark from flags to page; its numbers, and one small run on two real ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_llep.experts.sequential import LendableSequentialMLP
from support.layout import Layout, use_layout
from support.ranks import RankError, run_ranks

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.imbalance import __main__ as command  # noqa: E402
from benchmarks.imbalance.data import LayerSizes  # noqa: E402
from benchmarks.imbalance.memory import measure_peak  # noqa: E402
from benchmarks.imbalance.ranks import Found, Job, Moved, measure  # noqa: E402
from benchmarks.imbalance.report import draw, format_page, format_table  # noqa: E402
from benchmarks.imbalance.rows import make_rows  # noqa: E402

QUICK = ("--quick", "--steps", "2", "--workloads", "W2", "W6", "--methods", "plain", "exact")


def make_job(*flags: str) -> Job:
    return command.make_job(command._parse(flags))


def test_what_runs_by_default():
    job = make_job()
    assert vars(job.sizes) == {
        "num_ranks": 2,
        "num_experts": 16,
        "top_k": 2,
        "tokens": 512,
        "hidden": 256,
        "ffn": 512,
    }
    assert job.modes == ("dispatch", "layer", "train")
    assert job.workloads == tuple(f"W{number}" for number in range(8))
    assert list(job.methods) == [
        *("forced", "plain", "tolerant", "exact", "lla", "eplb", "eplb+replicas")
    ]
    assert job.methods["lla"].min_tokens_per_gemm == 64  # half of 128
    assert list(make_job("--cost-model", "h200").methods)[5] == "auto"
    assert make_job("--quick", "--tokens", "80").sizes.tokens == 80
    assert make_job("--ep", "4", "--tokens", "8192").methods["lla"].min_tokens_per_gemm == 1024


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--ep", "1"), "--ep 1: "),
        (("--ep", "3"), "--experts 16: .* --ep 3"),
        (("--top-k", "9"), "--top-k 9: "),
        (("--hidden", "12"), "--hidden 12: "),
        (("--ffn", "0"), "--ffn 0: "),
        (("--tokens", "2"), "--tokens 2: "),
        (("--steps", "0"), "--steps 0: "),
        (("--steps", "3"), "--steps 3: W7"),
        (("--rounds", "0"), "--rounds 0: "),
        (("--seed", "-1"), "--seed -1"),
        (("--modes", "training"), "--modes training: .*dispatch, layer, train"),
        (("--workloads", "W9"), "--workloads W9: .*W7"),
        (("--methods", "eplp"), "--methods eplp: .*eplb"),
        (("--methods", "auto"), "--methods auto: .*--cost-model"),
        (("--cost-model", "/no/such/file"), "/no/such/file"),
    ],
)
def test_flags_that_are_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        make_job(*flags)


def test_what_the_rows_say(tmp_path):
    job = make_job("--modes", "layer", "--workloads", "W2", "--methods", "plain", "eplb")
    plain, forced, eplb = (("layer", "W2", name) for name in ("plain", "forced", "eplb"))

    def moved(pairs: list[int], crossing: int = 0, weights: int = 0) -> Moved:
        return Moved(
            pairs=pairs,
            crossing=crossing,
            weight_numbers=weights,
            gradient_numbers=weights,
            lent=1,
        )

    shared = {
        "moved": {
            forced: [moved([8, 8])] * 2,
            plain: [moved([12, 4], 6), moved([8, 8], 2)],
            eplb: [moved([9, 7], weights=100)] * 2,
        },
        "placed": {forced: 0, plain: 0, eplb: 3},
        "off_by": dict.fromkeys((forced, plain, eplb), 1e-6),
    }
    found = [
        Found(
            seconds={
                forced: [[1.0, 1.0]] * 3,
                plain: [[2.0, 1.0], [1.0, 5.0], [1.0, 1.0]],
                eplb: [[1.0, 1.0]] * 3,
            },
            peak_bytes={forced: 100, plain: 300, eplb: 100},
            **shared,
        ),
        Found(
            seconds={
                forced: [[1.0, 1.0]] * 3,
                plain: [[1.0, 4.0], [1.0, 1.0], [2.0, 3.0]],
                eplb: [[1.0, 3.0]] * 3,
            },
            peak_bytes={forced: 200, plain: 250, eplb: 220},
            **shared,
        ),
    ]
    rows = make_rows(job, found)
    row = {row.method: row for row in rows}
    # The slowest rank's steps: 2 4, 1 5, 2 3.
    assert row["plain"].seconds == row["plain"].to_forced == 3.0
    assert row["plain"].slowest_step_seconds == 4.0
    assert row["plain"].worst_pairs == 12
    assert row["plain"].imbalance == 1.5
    assert row["plain"].token_bytes == 4 * (4 * 256 + 2) * 4
    assert row["plain"].weight_bytes == row["plain"].placed_bytes == 0
    assert row["plain"].peak_bytes == 300
    assert row["plain"].peak_to_forced == 1.5
    assert row["eplb"].weight_bytes == 200 * 4
    assert row["eplb"].placed_bytes == 3 * 3 * 256 * 512 * 4
    assert row["eplb"].to_forced == 2.0
    table = format_table(rows)
    assert len(table) == 2 + 3
    assert len({line.count("|") for line in table}) == 1
    draw(rows, "a caption", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def small_run() -> tuple[Job, list[Found]]:
    job = make_job(*QUICK)

    def work(rank: int, size: int) -> Found:
        with use_layout(Layout(ep=2)):
            return measure(rank, job, "cpu", Found())

    return job, run_ranks(work, 2, timeout=200)


def test_a_small_run(small_run):
    job, found = small_run
    rows = {(row.mode, row.workload, row.method): row for row in make_rows(job, found)}
    assert len(rows) == 3 * 2 * 3
    for mode, workload, method in rows:
        row = rows[mode, workload, method]
        assert row.seconds > 0
        assert 0 < row.off_by < 2e-5
        # 75% on one of two ranks; or half, and 3 of 7 parts of the rest.
        of_plain = 1.5 if workload == "W2" else 2 * (1 / 2 + 3 / 14)
        assert row.imbalance == pytest.approx(of_plain if method == "plain" else 1.0, abs=0.02)
        assert (row.lent > 0) == (method == "exact")
        assert (row.weight_bytes > 0) == (method == "exact" and mode != "dispatch")
    train = {method: rows["train", "W2", method] for method in job.methods}
    assert train["plain"].peak_bytes > train["exact"].peak_bytes > train["forced"].peak_bytes
    exact = rows["layer", "W2", "exact"]
    assert exact.weight_bytes == exact.lent * 2 * job.sizes.expert_numbers * 4
    # Each rank holds half of its tokens for the other in all of these.
    assert rows["layer", "W2", "forced"].token_bytes == 128 * (4 * 32 + 2) * 4
    assert found[0].moved == found[1].moved
    assert found[0].digests == found[1].digests


def test_a_page_has_all_that_was_run(small_run):
    job, found = small_run
    rows = make_rows(job, found)
    record = dict.fromkeys(("command", "machine", "load", "described", "ranks", "memory"), "x")
    numbers = {"rounds": 1, "steps": 2, "history": 8, "lla_min_tokens": 16, "checked": 36}
    page = format_page({**record, **numbers, "tolerance": 2e-5}, rows, "p.png")
    assert all(line in page for line in format_table(rows))
    assert "(p.png)" in page


def test_wrong_foreign_weights_are_found(monkeypatch):
    """LLEP computes its foreign experts with weights of a native one."""

    def work(rank: int, size: int) -> None:
        right = LendableSequentialMLP.compute_foreign
        monkeypatch.setattr(
            LendableSequentialMLP,
            "compute_foreign",
            lambda self, hidden, probs, tokens, foreign: right(
                self, hidden, probs, tokens, [self.weights()[0] for _ in foreign]
            ),
        )
        with use_layout(Layout(ep=2)):
            measure(rank, make_job(*QUICK, "--modes", "layer"), "cpu", Found())

    with pytest.raises(
        RankError, match=r"OracleError: exact under W2, mode layer, step 0: .*chose"
    ):
        run_ranks(work, 2, timeout=100)


def test_peak_memory_of_a_layer():
    """Weights and gradients at least, and no more than a part above them for few tokens."""

    def work(rank: int, size: int) -> tuple[int, int]:
        from benchmarks.imbalance.layer import build_layer

        sizes = LayerSizes(num_ranks=2, num_experts=4, top_k=1, tokens=4, hidden=64, ffn=64)
        with use_layout(Layout(ep=2)):
            kept: list[MoELayer] = []
            peak = measure_peak(lambda: kept.append(build_layer(sizes, 0)))
            layer = kept.pop()
            weights = sum(each.numel() * 4 for each in layer.parameters())
            again = measure_peak(lambda: [torch.zeros_like(each) for each in layer.parameters()])
            assert weights <= again < 1.01 * weights
            return peak, weights

    for peak, weights in run_ranks(work, 2):
        assert weights < peak < 3 * weights


@pytest.mark.slow
def test_four_ranks_of_another_size():
    flags = ("--quick", "--ep", "4", "--top-k", "3", "--hidden", "40", "--experts", "12")
    job = make_job(*flags, "--workloads", "W4", "W6", "--steps", "2")

    def work(rank: int, size: int) -> Found:
        with use_layout(Layout(ep=4)):
            return measure(rank, job, "cpu", Found())

    rows = make_rows(job, run_ranks(work, 4, timeout=280))
    assert len(rows) == 3 * 2 * 7
    assert all(row.off_by < 2e-5 for row in rows)


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.imbalance", *QUICK, "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "imbalance.json").read_text())
    assert len(results["rows"]) == 3 * 2 * 3
    assert results["command"].startswith("python -m benchmarks.imbalance --quick")
    assert (tmp_path / "imbalance.md").read_text().count("| W2 | ") == 3
    assert (tmp_path / "imbalance.png").stat().st_size > 10_000
    refused = subprocess.run(
        [sys.executable, "-m", "benchmarks.imbalance", "--ep", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert refused.returncode == 1
    assert "error: --experts 16" in refused.stderr
    assert "Traceback" not in refused.stderr
