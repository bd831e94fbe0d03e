"""tools/convert_hf.py, started as a user does: to a Megatron checkpoint, and back from it."""

import sys
from pathlib import Path

import pytest
import torch
from hf_models import make_gpt_oss, read_weights

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "scripts")]

import convert_hf  # noqa: E402
from script_runs import run_command  # noqa: E402

from support.ports import find_free_port  # noqa: E402

SCRIPT = str(ROOT / "tools" / "convert_hf.py")


@pytest.mark.slow
def test_to_megatron_in_one_process_and_back_in_another_layout(tmp_path):
    folder = make_gpt_oss(tmp_path / "model", torch.bfloat16, num_hidden_layers=2)
    tokenizer = {"tokenizer_config.json": "{}", "chat_template.jinja": "{{ messages }}"}
    for name, text in tokenizer.items():
        (folder / name).write_text(text)
    checkpoint, saved = str(tmp_path / "checkpoint"), tmp_path / "saved"
    run_command([sys.executable, SCRIPT, "--hf-load", str(folder), "--save", checkpoint], 100)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-port", str(find_free_port())]
    flags = ["--load", checkpoint, "--hf-config", str(folder), "--hf-save", str(saved)]
    run_command([*torchrun, SCRIPT, *flags, "--expert-model-parallel-size", "2"], 100)
    expected, actual = read_weights(folder), read_weights(saved)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    for name, text in tokenizer.items():
        assert (saved / name).read_text() == text
    assert (saved / "generation_config.json").exists()


BAD = {
    "nothing": ([], "--hf-load MODEL --save"),
    "no target": (["--hf-load", "model"], "give --save or --hf-save"),
    "two sources": (["--hf-load", "model", "--load", "checkpoint"], "--hf-load MODEL --save"),
    "no model": (["--load", "checkpoint", "--hf-save", "new"], "--hf-config MODEL"),
    "no checkpoint": (
        ["--load", "nowhere", "--hf-config", "model", "--hf-save", "new"],
        "--load nowhere: there is no Megatron checkpoint",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_command_line_that_converts_nothing_is_refused(name):
    flags, message = BAD[name]
    with pytest.raises(ValueError, match=r"give|--load") as error:
        convert_hf.complete_flags(flags)
    assert message in str(error.value)
