"""What is published: one version, and archives with all of the package and nothing else."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import megatron_llep

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools import build_meta as b; b.build_sdist('out'); b.build_wheel('out')"


def list_tracked(*folders: str) -> list[str]:
    """Files of the repository."""
    command = ["git", "ls-files", "--", *folders]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()


def run_python(code: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path) -> dict[str, set[str]]:
    """Names in the archives that a folder makes, by what they end in; of the sdist its own."""
    run_python(BUILD, source, PYTHONPATH="")
    (sdist,), (wheel,) = source.glob("out/*.tar.gz"), source.glob("out/*.whl")
    with tarfile.open(sdist) as archive:
        files = [each.name for each in archive.getmembers() if each.isfile()]
    with zipfile.ZipFile(wheel) as archive:
        return {
            "sdist": {name.partition("/")[2] for name in files},
            "wheel": set(archive.namelist()),
        }


def test_the_version_is_in_one_place():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == megatron_llep.__version__
    assert citation["title"] == "megatron_llep"
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^dynamic = \["version"\]$', project, flags=re.MULTILINE)


@pytest.mark.slow
def test_archives_hold_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    for name in list_tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    for stray in ("runs/demo/report.html", "benchmarks/results/new.json", ".venv/lib/x.py"):
        (source / stray).parent.mkdir(parents=True, exist_ok=True)
        (source / stray).write_text("")
    package = set(list_tracked("megatron_llep"))
    built = build(source)

    info = f"megatron_llep-{megatron_llep.__version__}.dist-info"
    assert {name for name in built["wheel"] if not name.startswith(info)} == package
    others = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md"}
    others |= {"pyproject.toml", "setup.cfg"}
    generated = {name for name in built["sdist"] if name.startswith("megatron_llep.egg-info/")}
    assert built["sdist"] - generated == package | others

    # From the source archive alone comes the same wheel.
    (sdist,), (wheel,) = source.glob("out/*.tar.gz"), source.glob("out/*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "again", filter="data")
    (again,) = (tmp_path / "again").iterdir()
    assert build(again)["wheel"] == built["wheel"]

    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
        metadata = archive.read(f"{info}/METADATA").decode()
    assert f"Version: {megatron_llep.__version__}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    code = "import megatron_llep as m; print(m.__file__, *(getattr(m, n) for n in m.__all__))"
    assert run_python(code, tmp_path, PYTHONPATH=str(installed)).startswith(str(installed))
