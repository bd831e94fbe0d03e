"""doctor: a sound machine, and the traps it knows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llep.offline import seams
from megatron_llep.offline.cli import doctor, main


def test_nothing_is_broken_here(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "nothing is broken" in out
    assert "BROKEN" not in out
    assert "megatron-core 0.19" in out
    assert "--fp8-recipe" in out


def test_half_installed_packages(tmp_path):
    """A Transformer Engine without its library breaks Megatron's import; PyPI's apex is foreign."""
    for name, text in (
        ("transformer_engine", "raise OSError('libte.so: not there')"),
        ("apex", ""),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "megatron_llep", "doctor"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    broken = [line for line in done.stdout.splitlines() if line.startswith("BROKEN")]
    assert len(broken) == 3
    assert "half installed" in broken[0]
    assert "libte.so" in broken[0]
    assert "apex: not NVIDIA's" in broken[1]
    assert "megatron-core cannot be imported" in broken[2]
    assert "pip uninstall apex" in done.stdout
    assert done.stdout.endswith("3 broken\n")


def test_another_transformer_engine(monkeypatch):
    """One that has what LLEP uses, but with which it was never run."""
    known = doctor.importlib.metadata.version
    versions = {"transformer-engine": "2.30.1"}

    def version(name):
        return versions[name] if "transformer-engine" in name and name in versions else known(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "TRANSFORMER_ENGINE_CHECK", "pass")
    (finding,) = doctor.check_transformer_engine()
    assert finding.state == "note"
    assert "2.30.1" in finding.what
    assert "tested with 2.20" in finding.remedy


def test_nvidia_s_apex(tmp_path, monkeypatch):
    (tmp_path / "apex" / "optimizers").mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [finding.state for finding in doctor.check_apex()] == ["ok"]


def test_a_seam_that_is_gone(monkeypatch):
    change = seams.Change(
        name="megatron.core.gone", file=Path("core.py"), expected="it", found="nothing", users=()
    )
    monkeypatch.setattr(
        doctor.seams, "check", lambda folder: seams.Report(changes=[change], num_names=1)
    )
    (finding,) = doctor.check_seams()
    assert finding.state == "BROKEN"
    assert "megatron.core.gone" in finding.what
    assert "pip install" in finding.remedy


@pytest.mark.parametrize(
    ("version", "state"),
    [("0.17.1", "BROKEN"), ("0.18.2", "note"), ("0.20.0", "note"), ("0.21.0", "BROKEN")],
)
def test_another_megatron(monkeypatch, version, state):
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: version)
    finding = next(iter(doctor.check_megatron()))
    assert finding.state == state
    assert version in finding.what
    assert finding.remedy
