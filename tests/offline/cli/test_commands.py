"""The commands as a user runs them: tables, files, errors."""

import json
import subprocess
import sys

import pytest

from megatron_llep.offline.cli import COMMANDS, main
from megatron_llep.offline.workloads import make_counts
from megatron_llep.planner import make_plan


def run(capsys, *argv):
    status = main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_plan_prints_the_plan(capsys):
    status, out, _ = run(capsys, "plan", "--ranks", 4, "--experts", 16, "--planner", "exact")
    assert status == 0
    counts = make_counts("lognormal-2", num_ranks=4, num_experts=16, tokens_per_rank=4096, top_k=4)
    plan = make_plan(counts, planner="exact")
    lines = out.splitlines()
    assert lines[0] == "4 ranks, 16 experts, 65536 (token, expert) pairs, 16384 a rank on average"
    assert lines[1] == (
        f"largest load: {plan.imbalance_before:.3f} -> 1.000 x mean; "
        f"{len(plan.transfers)} experts lent, at most {plan.max_foreign} to a rank"
    )
    rows = [line.split() for line in lines[4:]]
    assert [int(row[1]) for row in rows] == plan.load_per_rank_before.tolist()
    assert [int(row[2]) for row in rows] == [16384] * 4
    assert sum(int(row[3]) for row in rows) == len(plan.transfers)
    borrowed = [(int(e), r) for r, row in enumerate(lines[4:]) for e in _borrowed(row)]
    assert sorted(borrowed) == sorted((e, b) for e, _, b in plan.transfers.tolist())


def _borrowed(row):
    return [part.split()[-1] for part in row.split(maxsplit=3)[3].split(":")[:-1]]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plan_draws(capsys, tmp_path, suffix):
    pictures = [tmp_path / f"{i}.{suffix}" for i in range(2)]
    for picture in pictures:
        argv = ("--ranks", 2, "--experts", 8, "--workload", "hot-80-1", "--output", picture)
        assert run(capsys, "plan", *argv)[0] == 0
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    start = b"\x89PNG" if suffix == "png" else b"<?xml"
    assert pictures[0].read_bytes().startswith(start)


def write_trace(folder):
    for rank in range(2):
        records = [
            {
                "step": step,
                "block": "decoder",
                "layer": layer,
                "rank": rank,
                "num_tokens": 3,
                "topk": 4,
                "top_indices": [[0, 1, 2, 3 + 3 * step + layer]] * 3,
            }
            for step in range(2)
            for layer in range(2)
        ]
        path = folder / f"router_trace_rank{rank}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_plan_of_a_trace(capsys, tmp_path):
    write_trace(tmp_path)
    argv = ("plan", "--trace", tmp_path, "--ranks", 2, "--experts", 8)
    # 6 tokens: experts 0, 1, 2 of rank 0, and one that moves to rank 1 with step and layer.
    for step, layer, loads in ((0, 0, [24, 0]), (0, 1, [18, 6]), (1, 0, [18, 6])):
        status, out, _ = run(capsys, *argv, "--step", step, "--layer", layer)
        assert status == 0
        assert [int(line.split()[1]) for line in out.splitlines()[4:]] == loads
    status, _, err = run(capsys, *argv, "--step", 2)
    assert status == 2
    assert "the trace has 2 layers and 2 micro-batches" in err


def test_simulate_one_case_shows_all_methods(capsys):
    argv = ("--model", "gpt-oss-120b", "--workload", "hot-95-1", "--tokens", 4096, "--steps", 1)
    status, out, _ = run(capsys, "simulate", *argv, "--repeat-experts")
    assert status == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines()[5:]}
    assert next(iter(rows)) == "plain"
    assert rows["plain"][1] == "7.65"
    assert rows["exact"][1] == "1.00"
    assert float(rows["exact"][9].rstrip("x")) > 2


def test_simulate_writes_files(capsys, tmp_path):
    argv = ("--workload", "balanced", "hot-rank", "--ep", 2, 4, "--model", "gpt-oss-120b")
    argv += ("--tokens", 1024, "--steps", 1, "--replace-every", 1, "--output", tmp_path)
    status, out, _ = run(capsys, "simulate", *argv, "--methods", "exact", "tolerant")
    assert status == 0
    assert "predicted, not measured" in out
    record = json.loads((tmp_path / "simulate.json").read_text())
    cases = [(r["routing"], r["num_ranks"]) for r in record["results"]]
    assert cases == [("balanced", 2), ("hot-rank", 2), ("balanced", 4), ("hot-rank", 4)]
    assert set(record["results"][0]["outcomes"]) == {"plain", "exact", "tolerant"}
    assert (tmp_path / "simulate.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "simulate.html").read_text()
    assert page.count("<table>") == 5
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_simulate_a_trace(capsys, tmp_path):
    write_trace(tmp_path)
    argv = ("simulate", "--trace", tmp_path, "--model", "gpt-oss-120b", "--ep", 2)
    status, out, _ = run(capsys, *argv)
    assert status == 0
    # All choices are experts of rank 0 of 2 (its 64).
    assert next(line for line in out.splitlines() if line.startswith("plain")).split()[1] == "2.00"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("plan", "--workload", "hottest"), "workload 'hottest' is unknown"),
        (("plan", "--experts", 7), "7 experts do not divide over 8 ranks"),
        (("plan", "--max-foreign", 99), "max_foreign=99"),
        (("plan", "--ranks-per-node", 3), "--ranks-per-node 3"),
        (("plan", "--trace", "/nowhere"), "has no router_trace_rank"),
        (("simulate", "--model", "gpt-5"), "model 'gpt-5' is unknown"),
        (("simulate", "--machine", "/nowhere.json"), "or give a preset: h100, h200"),
        (("simulate", "--ep", 1024), "128 experts do not divide over 1024 ranks"),
        (("simulate", "--steps", 0), "--steps must be at least 1"),
        (("simulate", "--spare-slots", -1), "--spare-slots must be at least 0"),
        (("simulate", "--methods", "plain", "--output", "/nowhere"), "--methods plain"),
    ],
)
def test_errors_are_one_line(capsys, argv, message):
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert message in err
    assert err.startswith(f"python -m megatron_llep {argv[0]}: ")
    assert err.count("\n") == 1


def test_every_command_has_help(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert "usage: python -m megatron_llep " + command in capsys.readouterr().out


def test_simulate_without_matplotlib_and_tqdm(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = ("--model", "gpt-oss-120b", "--workload", "zipf", "--methods", "exact", "--tokens", 64)
    assert run(capsys, "simulate", *argv)[0] == 0
    status, _, err = run(capsys, "simulate", *argv, "--output", tmp_path)
    assert status == 2
    assert "pip install 'megatron-llep[plot]'" in err


def test_runs_as_a_module_without_torch():
    code = (
        "import sys; from megatron_llep.offline.cli import main; main(['plan']); "
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.splitlines()[-1] == "False"
    module = [sys.executable, "-m", "megatron_llep", "plan", "--ranks", "1", "--experts", "5"]
    result = subprocess.run(module, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert "1.000 -> 1.000" in result.stdout
