"""docs/frameworks.md: what of it needs no framework; other snippets run in their own tests."""

import importlib
import re
import shlex
import sys
from argparse import Namespace
from types import ModuleType
from typing import Any

import yaml
from framework_doc import ROOT, TEXT, get_blocks

from megatron_llep.integration import nemo_rl, slime
from megatron_llep.integration.frameworks import TRIED, take_settings
from megatron_llep.integration.llep_layers import find_layers
from support.layout import Layout, use_layout
from support.ranks import run_ranks
from support.training import Run, build_model, make_config


def test_the_table_names_what_was_tried():
    (table,) = re.findall(r"(?:^\|.*\n)+", TEXT, flags=re.MULTILINE)
    for package, version in TRIED.items():
        name = "source," if package in ("slime", "nemo-rl") else package
        assert f"{name} {version}" in table


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    headings = {"#" + line[3:].lower() for line in TEXT.splitlines() if line.startswith("## ")}
    for link in links:
        assert link in headings or (ROOT / "docs" / link).is_file(), link


def test_slime_takes_its_options_and_settings():
    (options,) = get_blocks("slime", "sh")
    (settings,) = get_blocks("slime", "yaml")
    _, module, name, _, hook = shlex.split(options)
    assert getattr(importlib.import_module(module), name) is slime.layers
    assert hook == f"{slime.__name__}.{slime.log_last_step.__name__}"
    assert slime.settings_of(Namespace(**yaml.safe_load(settings))).planner == "exact"


def test_nemo_rl_takes_its_snippet_and_settings(monkeypatch):
    (snippet,) = get_blocks("NeMo-RL", "python")
    (settings,) = get_blocks("NeMo-RL", "yaml")
    registry: Any = ModuleType(nemo_rl._REGISTRY)
    registry.ACTOR_ENVIRONMENT_REGISTRY = {nemo_rl._PLAIN: "python"}
    policies: Any = ModuleType("nemo_rl.models.policy.lm_policy")
    policies.Policy = dict
    for module in (registry, policies):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    given: dict[str, Any] = {}
    names = dict.fromkeys(("config", "tokenizer", "dataset", "val_dataset"))
    exec(snippet, names | {"setup": lambda *args, **kwargs: given.update(kwargs)})
    worker = given["policy_factory"]()["worker_extension_cls_fqn"]
    assert f'worker_extension_cls_fqn="{worker}"' in TEXT
    overrides = yaml.safe_load(settings)["policy"]["megatron_cfg"]["model_overrides"]
    assert take_settings(overrides, "model_overrides").planner == "tolerant"


def test_models_that_are_built_elsewhere():
    run = Run(layout=Layout(ep=2))
    snippet = get_blocks("ms-swift", "python")[1]

    def work(rank: int, size: int) -> int:
        with use_layout(run.layout):
            chunks = build_model(make_config(run), run)
            names: dict[str, Any] = {"get_mcore_model": lambda config: chunks, "config": None}
            exec(snippet, names)
            return len(find_layers(names["models"]))

    assert run_ranks(work, 2) == [2, 2]
