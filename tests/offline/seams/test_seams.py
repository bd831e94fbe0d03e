"""What is used of Megatron against trees of it: as installed, and with things changed.

A changed tree is one of links to the installed files, but for the files that are changed.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_llep.offline import seams
from megatron_llep.offline.seams import recorded
from megatron_llep.offline.seams.signatures import Call, Signature
from tools import check_seams

INSTALLED = Path(importlib.util.find_spec("megatron.core").origin).parents[2]
MOE = "core/transformer/moe"
VERSION = seams.read_version(INSTALLED)

CHANGES = {
    f"{MOE}/moe_utils.py": [
        ("def get_default_pg_collection(", "def make_default_pg_collection("),
        ("def unpermute(\n    permuted_tokens", "def unpermute(\n    permuted"),
    ],
    "core/parallel_state.py": [("def create_group(", "def make_group(")],
    "training/argument_utils.py": [("class ArgumentGroupFactory", "class GroupFactory")],
    f"{MOE}/moe_layer.py": [
        ("def routed_experts_compute(", "def compute_routed_experts("),
        ("def combine(self, output", "def combine(self, more, output"),
    ],
    f"{MOE}/token_dispatcher.py": [
        ("def dispatch_preprocess(\n        self, hidden_states", "def dispatch_preprocess(self, x")
    ],
    "core/enums.py": [("encoder_or_decoder =", "decoder =")],
    # What its package imports from it, under the name of the module itself.
    "core/distributed/finalize_model_grads.py": [
        ("def finalize_model_grads(", "def finalize_all_grads(")
    ],
    "core/model_parallel_config.py": [
        ("    overlap_moe_expert_parallel_comm:", "    overlap_ep_comm:")
    ],
}
"""By file: what is replaced in it."""

FOUND = {
    "moe_utils.get_default_pg_collection": ("layer.py", "it is not there"),
    "moe_utils.unpermute": ("travel/sums.py", "unpermute(permuted, "),
    "core.parallel_state.create_group": ("lending/groups.py", "it is not there"),
    "training.argument_utils.ArgumentGroupFactory": (
        "integration/arguments.py",
        "it is not there",
    ),
    "MoELayer.routed_experts_compute": ("layer.py", "nothing calls this"),
    "MoELayer.combine": ("layer.py", "combine(more, output"),
    "MoEAlltoAllTokenDispatcher.dispatch_preprocess": ("dispatcher.py", "(x, "),
    "core.distributed.finalize_model_grads": ("gpu_checks/lending_run.py", "it is not there"),
    "ModelType.encoder_or_decoder": ("compat/training.py", "it is not there"),
    "TransformerConfig.overlap_moe_expert_parallel_comm": ("layer.py", "it is not there"),
}
"""The ends of the names that are then found: a user of each, and what is said."""


def copy_with(folder: Path, changes: dict[str, Callable[[str], str]]) -> Path:
    """A tree in which some files' texts are what functions make of them."""
    for file, change in changes.items():
        here, there = folder / "megatron", INSTALLED / "megatron"
        for part in Path(file).parts:
            if here.is_symlink():
                here.unlink()
            here.mkdir(parents=True, exist_ok=True)
            for each in there.iterdir():
                if not (here / each.name).exists():
                    (here / each.name).symlink_to(each)
            here, there = here / part, there / part
        here.unlink()
        here.write_text(change(there.read_text()))
    return folder


def replace_all(pairs: list[tuple[str, str]]) -> Callable[[str], str]:
    def change(text: str) -> str:
        for old, new in pairs:
            assert old in text, old
            text = text.replace(old, new)
        return text

    return change


def test_the_installed_one_is_as_recorded():
    """If this fails after a change of ours: `python tools/check_seams.py --write` for each tree."""
    report = seams.check(INSTALLED, also=check_seams.ALSO)
    assert report.changes == []
    assert report.num_names > 200
    assert json.loads(seams.note(INSTALLED, also=check_seams.ALSO)) == recorded.load()


def test_what_is_changed_is_found(tmp_path, capsys):
    tree = copy_with(tmp_path, {file: replace_all(pairs) for file, pairs in CHANGES.items()})
    changes = seams.check(tree, also=check_seams.ALSO).changes
    for end, (user, said) in FOUND.items():
        of_it = [each for each in changes if each.name.endswith(end)]
        assert of_it, end
        users = [each.split(":")[0] for change in of_it for each in change.users]
        assert any(each.endswith(f"/{user}") for each in users)
        assert any(said in change.found for change in of_it)
        assert all(change.file.is_relative_to(tree) for change in of_it)


def test_the_script_names_it(tmp_path, capsys):
    """And a name that is moved, but can be imported from where it was, is none."""

    def move(text: str) -> str:
        text = text.replace("def get_default_pg_collection", "def make_default_pg_collection")
        return f"{text}\nget_default_pg_collection = make_default_pg_collection\n"

    rename = replace_all([("def is_graph_capturing", "def captures_graph")])
    tree = copy_with(
        tmp_path, {f"{MOE}/moe_utils.py": move, "core/transformer/cuda_graphs.py": rename}
    )
    assert check_seams.main([str(tree)]) == 1
    out = capsys.readouterr().out
    assert "megatron.core.transformer.cuda_graphs.is_graph_capturing\n" in out
    assert "used by:  megatron_llep/layer.py:" in out
    assert f"{tree}/megatron/core/transformer/cuda_graphs.py" in out
    assert out.endswith("\n")
    assert "\n1 of " in out


def test_a_folder_without_megatron(tmp_path, capsys):
    assert check_seams.main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.skipif(VERSION < (0, 19), reason="it is itself the older one")
def test_only_the_branch_of_a_version_is_read(tmp_path):
    """A tree that calls itself an older one is checked for what that one has."""
    minor = replace_all([(f"MINOR = {VERSION[1]}", "MINOR = 18")])
    older = copy_with(tmp_path, {"core/package_info.py": minor})
    names = {each.name for each in seams.check(older).changes}
    assert names == {"megatron.training.pretrain", "megatron.core.utils.get_batch_on_this_tp_rank"}


@pytest.mark.parametrize(
    "text", ["()", "(a, b=, *args, c, d=, **kwargs)", "(a=, *, b)", "(*args)", "(**kwargs)"]
)
def test_signatures_are_read_as_written(text):
    assert str(Signature.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "call", "problem"),
    [
        ("(a, b=)", Call(positional=2), ""),
        ("(a, b=)", Call(positional=3), "takes 2 arguments by position, 3 given"),
        ("(a, b=)", Call(names=frozenset("b")), "requires a"),
        ("(a, b=)", Call(positional=1, names=frozenset("c")), "has no parameter c"),
        ("(a, b=)", Call(positional=2, names=frozenset("a")), "has no parameter a"),
        ("(a, **more)", Call(positional=1, names=frozenset("c")), ""),
        ("(a, *, b)", Call(positional=1), "requires b"),
        ("(a, *, b)", Call(positional=1, is_partial=True), ""),
    ],
)
def test_calls_that_fit(text, call, problem):
    assert Signature.parse(text).misfit(call) == problem
