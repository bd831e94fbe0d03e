"""verl: its own Megatron engine, as its registry gives it, trained and exported."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from framework_doc import get_blocks
from tiny_models import make_folder
from verl_runs import PLAIN, STEPS, VerlRun, export, make_config, run_engine, start_engine

from megatron_llep.integration.frameworks import SeamError
from megatron_llep.metrics import METRICS, PREFIX
from support.ranks import RankError, run_ranks

EAGER = {"planner": "exact", "imbalance_threshold": 1.0}
(BLOCK,) = get_blocks("verl", "sh")
OPTIONS = shlex.split(BLOCK)
MODULE = OPTIONS[0].partition("=")[2]


def test_the_options_are_those_of_verl():
    import verl
    from megatron.bridge.training.utils.omegaconf_utils import parse_hydra_overrides
    from omegaconf import OmegaConf

    folder = Path(verl.__file__).parent / "trainer" / "config"
    config = OmegaConf.load(folder / "_generated_ppo_megatron_trainer.yaml")
    config = parse_hydra_overrides(config, OPTIONS).actor_rollout_ref
    assert config.model.external_lib == MODULE == "megatron_llep.integration.verl"
    for role in (config.actor, config.ref):
        assert role.megatron.override_transformer_config.llep == {"enabled": True}


def train(rank: int, size: int, folder: Path, layout: dict[str, int]) -> dict[str, VerlRun]:
    runs: dict[str, VerlRun] = {}
    for name, llep in (("plain", False), ("llep", EAGER)):
        engine = start_engine(make_config(folder, MODULE, {"llep": llep}, **layout))
        assert type(engine).__name__ == "LLEPEngineWithLMHead", "the registry gave another one"
        runs[name] = run_engine(engine, rank)
        if name == "plain":
            same = start_engine(make_config(folder, MODULE, {}, **layout), PLAIN)
            continue
        # The same parameters in verl's own engine go out as the same bits.
        for mine, other in zip(engine.module, same.module, strict=True):
            other.module.load_state_dict(mine.module.state_dict())
        plain_weights = export(same)
        assert runs[name].weights.keys() == plain_weights.keys()
        for key, tensor in plain_weights.items():
            assert torch.equal(runs[name].weights[key], tensor), key
    return {
        name: VerlRun(run.losses, run.metrics, {"number": torch.tensor(len(run.weights))})
        for name, run in runs.items()
    }


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, {"expert_model_parallel_size": 2}),
        (4, {"expert_model_parallel_size": 4}),
        (
            4,
            {
                "expert_model_parallel_size": 2,
                "expert_tensor_parallel_size": 2,
                "tensor_model_parallel_size": 2,
            },
        ),
    ],
)
def test_the_engine_trains_and_exports(ranks, layout, tmp_path):
    make_folder(tmp_path)
    for runs in run_ranks(train, ranks, tmp_path, layout, timeout=600):
        plain, llep = runs["plain"], runs["llep"]
        assert len(plain.losses) == STEPS
        # In bf16, and a lent expert's tokens are in other GEMMs.
        assert llep.losses == pytest.approx(plain.losses, rel=5e-3)
        assert int(llep.weights["number"]) == 2 * (8 + 1 + 3 * 8) + 3
        if llep.metrics[0] is None or "grad_norm" not in llep.metrics[0]:
            continue  # not the rank that verl asks
        for metrics in llep.metrics:
            assert all(len(metrics[PREFIX + metric.name]) == 1 for metric in METRICS)
            assert metrics[PREFIX + "lent_experts"][0] > 0
        assert not any(name.startswith(PREFIX) for name in plain.metrics[0])


def start_without_the_module(rank: int, size: int, folder: Path) -> None:
    start_engine(make_config(folder, "json", {"llep": EAGER}))


def test_without_the_module_settings_stop_it(tmp_path):
    make_folder(tmp_path)
    with pytest.raises(RankError, match="has no attribute 'llep'"):
        run_ranks(start_without_the_module, 2, tmp_path, timeout=200)


def test_a_version_whose_engine_has_changed(monkeypatch):
    monkeypatch.delitem(sys.modules, "megatron_llep.integration.verl", raising=False)
    monkeypatch.delattr(PLAIN.__mro__[1], "_build_megatron_module")
    missing = re.escape("MegatronEngineWithLMHead._build_megatron_module")
    with pytest.raises(SeamError, match=f"verl [0-9.]+ has no {missing}"):
        import megatron_llep.integration.verl  # noqa: F401


def test_nothing_is_registered_by_being_installed():
    from importlib.metadata import distribution

    assert not list(distribution("megatron-llep").entry_points)
