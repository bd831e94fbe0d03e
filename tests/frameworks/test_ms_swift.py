"""ms-swift: its own `megatron sft` with the document's plugin and options."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from framework_doc import get_blocks
from swift_runs import STEPS, SwiftRun, run_sft, write_data
from tiny_models import add_tokenizer, make_folder

from megatron_llep.integration import ms_swift
from megatron_llep.integration.frameworks import SeamError
from megatron_llep.metrics import METRICS
from support.ranks import run_ranks

PLUGIN, _ = get_blocks("ms-swift", "python")
(OPTIONS,) = get_blocks("ms-swift", "sh")


def train(rank: int, size: int, folder: Path, name: str, options: list[str]) -> SwiftRun:
    os.environ["LOCAL_WORLD_SIZE"] = str(size)
    os.chdir(folder)
    return run_sft(folder / "model", folder / name, *options)


def test_sft_is_that_of_ms_swift(tmp_path):
    make_folder(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    write_data(tmp_path / "data.jsonl")
    (tmp_path / "llep_plugin.py").write_text(PLUGIN)
    runs = {
        name: run_ranks(train, 2, tmp_path, name, options, timeout=400)[0].log
        for name, options in (("plain", []), ("llep", shlex.split(OPTIONS)))
    }
    losses = {name: [line["loss"] for line in log if "loss" in line] for name, log in runs.items()}
    assert len(losses["plain"]) == STEPS
    # In bf16, and a lent expert's tokens are in other GEMMs.
    assert losses["llep"] == pytest.approx(losses["plain"], rel=5e-3)
    for line in runs["llep"]:
        if "loss" in line:
            assert all(f"moe/llep/{metric.name}" in line for metric in METRICS)
            assert line["moe/llep/lent_experts"] > 0
    assert not any(name.startswith("moe/llep") for line in runs["plain"] for name in line)


def test_a_version_whose_callbacks_have_moved(monkeypatch):
    module = sys.modules["swift.megatron.callbacks"]
    monkeypatch.setitem(sys.modules, "swift.megatron.callbacks", type(sys)(module.__name__))
    missing = re.escape("swift.megatron.callbacks.megatron_callbacks_map")
    with pytest.raises(SeamError, match=f"ms-swift [0-9.]+ has no {missing}"):
        ms_swift.register()
