"""tools/gpu_check.py: what it runs, and a trial run of the whole on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llep.offline.simulator.models import MODELS

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import gpu_check  # noqa: E402
from gpu_checks.critical_path import choose_ranks, make_case, shrink  # noqa: E402
from gpu_checks.demands import PLAIN  # noqa: E402
from gpu_checks.kernels import find_gpu_tests, judge_placement, judge_pytest  # noqa: E402
from gpu_checks.section import Section, format_summary  # noqa: E402


def test_the_gpu_tests_are_found_and_no_others(gpu_files):
    """Those that pytest collected, of as many files as it was given."""
    found = {Path(path) for path in find_gpu_tests(ROOT)}
    assert gpu_files <= found
    assert ROOT / "tests" / "tools" / "test_gpu_critical_path.py" in found
    assert ROOT / "tests" / "tools" / "test_prepare_corpus.py" not in found


def test_the_verdict_on_the_gpu_tests():
    assert judge_pytest(0, "...\n=== 3 passed, 9 deselected in 2.00s ===\n").state == "passed"
    assert judge_pytest(5, "== 9 deselected in 2.00s ==").state == "skipped"
    assert judge_pytest(0, "== 3 skipped in 2.00s ==").state == "skipped"
    failed = judge_pytest(1, "== 1 failed, 2 passed in 2.00s ==")
    assert failed.state == "FAILED"
    assert failed.reason == "1 failed, 2 passed in 2.00s"


@pytest.mark.parametrize(
    ("equal", "error", "state"),
    [(True, 1e-3, "passed"), (False, 1e-3, "FAILED"), (True, 1e-2, "FAILED")],
)
def test_the_verdict_on_placement(equal, error, state, capsys):
    found = {"cases": 5, "equal": equal, "worst_sum_error": error}
    assert judge_placement(found | {"milliseconds": {"list_pairs": 0.125}}).state == state
    assert "0.125 ms" in capsys.readouterr().out


def test_a_section_that_breaks_fails_and_the_others_run(monkeypatch, capsys, tmp_path):
    def break_down(*_, **__):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(gpu_check, "check_correctness", break_down)
    output = tmp_path / "found.json"
    options = ["--device", "cpu", "--quick", "--sections", "correctness", "kernels"]
    assert gpu_check.main([*options, "--output", str(output)]) == 1
    states = {s["name"]: s["state"] for s in json.loads(output.read_text())["sections"]}
    assert states == {"correctness": "FAILED", "kernels": "skipped"}
    assert "correctness: FAILED: no such luck" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--ep", "1"], "--ep 1"),
        (["--rounds", "0"], "--rounds 0"),
        (["--tokens", "0"], "--tokens 0"),
        (["--workloads", "nonsense"], "nonsense"),
        (["--cost-model", "nonsense"], "nonsense"),
    ],
)
def test_unusable_options_are_refused(options, fault, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--device", "cpu", *options])
    assert stop.value.code == 2
    assert fault in capsys.readouterr().err


def test_without_a_gpu_it_says_what_to_do(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.main([])
    assert stop.value.code == 2
    assert "--device cpu --quick" in capsys.readouterr().err


def test_the_judged_run_is_that_of_the_paper(monkeypatch):
    """All defaults, on a GPU: the sizes of Figure 4, and the results' own place."""
    args = gpu_check.build_parser().parse_args([])
    job = gpu_check.make_path_job(args)
    assert job.judged
    assert [model.tokens_per_rank for model in job.models] == [32768, 16384, 16384]
    assert args.output == ROOT / "benchmarks" / "results" / "gpu_check.json"
    smaller = gpu_check.build_parser().parse_args(["--tokens", "4096"])
    assert not gpu_check.make_path_job(smaller).judged


@pytest.mark.slow
def test_a_trial_run_of_the_whole(tmp_path):
    output = tmp_path / "gpu_check.json"
    options = ["--device", "cpu", "--quick", "--ep", "2", "--output", str(output), "--rounds", "1"]
    options += ["--workloads", "hot-95-1", "--models", "gpt-oss-120b", "--planners", "tolerant"]
    done = subprocess.run(
        [sys.executable, "tools/gpu_check.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert "torch" in found["versions"]
    sections = {section["name"]: section for section in found["sections"]}
    assert {name: section["state"] for name, section in sections.items()} == {
        "correctness": "passed",
        "placement": "skipped",
        "kernels": "skipped",
        "critical path": "not judged",
        "memory": "skipped",
    }
    comparisons = sections["correctness"]["data"]["ep2"]["comparisons"]
    assert [c["what"].split(",")[1].strip() for c in comparisons] == [
        *("float32", "bfloat16", "bfloat16"),
    ]
    assert all(c["lent"] > 0 for c in comparisons)
    rows = {(r["workload"], r["method"]): r for r in sections["critical path"]["data"]["rows"]}
    assert set(rows) == {
        (workload, method)
        for workload in ("balanced", "hot-95-1")
        for method in ("plain", "tolerant")
    }
    assert rows["hot-95-1", "plain"]["imbalance"] > 7
    assert rows["hot-95-1", "tolerant"]["imbalance"] <= 1.05
    for row in rows.values():
        assert row["layer_seconds"] > row["forward_seconds"] > row["host_seconds"] > 0
        assert row["idle_seconds"] is None, "no profiler sees a CPU's kernels"
    plain = make_case(shrink(MODELS["gpt-oss-120b"]), "hot-95-1", PLAIN)
    assert rows["hot-95-1", "plain"]["rank"] in choose_ranks(plain.plan)
    assert any("stand-in" in line for line in found["method"])


def test_the_summary_names_every_section():
    sections = [Section(name="a", state="passed"), Section(name="bc", state="FAILED", reason="why")]
    assert format_summary(sections).splitlines() == ["a   passed", "bc  FAILED: why"]
