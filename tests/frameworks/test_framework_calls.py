"""slime and NeMo-RL by the calls that they make, as neither is on the registry.

What stands for them here does what was read in their source, THUDM/slime at 624b824a and
NVIDIA-NeMo/RL at 7ea279ab: with which arguments, on which ranks, and in which order they call.
"""

import sys
from argparse import Namespace
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from megatron_llep.integration.frameworks import SeamError
from megatron_llep.metrics import METRICS
from support.layout import Layout
from support.llep import assert_same_run
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Run, make_config, train

RUN = Run(layout=Layout(ep=2), routing=Routing("hot"), ddp={"overlap_grad_reduce": True})
EAGER = {"planner": "exact", "imbalance_threshold": 1.0}
NAMES = [metric.name for metric in METRICS]


def have(name: str, **contents: object) -> ModuleType:
    """A module of this name, in this process."""
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(contents)
    return module


# slime/backends/megatron_utils/model_provider.py calls `spec(args, config, vp_stage)`, model.py the
# hook before a step on every rank, and logs on the last data-parallel rank 0 alone.


def train_as_slime(rank: int, size: int) -> dict[str, Any]:
    from megatron_llep.integration import slime

    logged: dict[str, Any] = {}
    have(
        "slime.observability.logging_utils",
        log=lambda args, metrics, step_key: logged.update({step_key: metrics}),
    )
    have("slime.backends.megatron_utils.initialize", is_megatron_main_rank=lambda: rank == 0)
    args = Namespace(llep=EAGER, rollout_batch_size=8, n_samples_per_prompt=2, global_batch_size=4)
    config = make_config(RUN)
    run = replace(RUN, prepare_wrapped=lambda wrapped: before(wrapped, 0))

    def before(model: Any, step: int) -> None:
        slime.log_last_step(args, 3, step, model, None, None)

    def after(chunks: Any) -> None:
        assert not logged, "there is no step before the first"
        before(chunks, 2)

    plain = train(RUN)
    llep = train(run, transform_spec=lambda spec: slime.layers(args, config, None), observe=after)
    assert_same_run(llep, plain)
    return logged


def test_slime_trains_and_logs():
    main, other = run_ranks(train_as_slime, 2)
    assert other == {}
    metrics = main["train/step"]
    assert metrics["train/step"] == 3 * 4 + 1
    assert metrics.keys() > {f"train/moe/llep/{name}" for name in NAMES}
    assert all(name.startswith("train/moe/llep/") for name in metrics.keys() - {"train/step"})
    assert metrics["train/moe/llep/lent_experts"] > 0


def test_slime_that_calls_otherwise():
    from megatron_llep.integration import slime

    with pytest.raises(SeamError, match=r"slime .* call spec\(args, config, vp_stage\)"):
        slime.layers(make_config(RUN), None)


def test_slime_flags_and_yaml():
    from megatron_llep.integration import slime

    assert slime.settings_of(Namespace()).enabled
    assert slime.settings_of(Namespace(llep={"planner": "exact"})).planner == "exact"
    with pytest.raises(ValueError, match=r"custom-config-path: llep\.plan"):
        slime.settings_of(Namespace(llep={"plan": "exact"}))


# nemo_rl/models/policy/workers/megatron_policy_worker.py: `__init__` leaves the wrapped model in
# `self.model`; `train` reduces the aux losses and clears Megatron's tracker before it returns.


def have_nemo_rl(model: Any = None) -> None:
    class MegatronPolicyWorkerImpl:
        def __init__(self, config: dict[str, Any], tokenizer: Any, **kwargs: Any) -> None:
            self.cfg, self.model = config, model

        def train(self, data: Any, loss_fn: Any) -> dict[str, Any]:
            from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

            get_moe_metrics_tracker().clear()
            return {"moe_metrics": {"load_balancing_loss": 1.0}}

        def finish_train_step(self) -> dict[str, Any]:
            return {}

        def offload_before_refit(self) -> str:
            return "offloaded"

    have(
        "nemo_rl.models.policy.workers.megatron_policy_worker",
        MegatronPolicyWorkerImpl=MegatronPolicyWorkerImpl,
    )
    have(
        "nemo_rl.models.policy.utils",
        get_runtime_env_for_policy_worker=lambda name: {"name": name},
    )
    have("ray", remote=lambda **options: lambda kind: kind)


def train_as_nemo_rl(rank: int, size: int) -> dict[str, Any]:
    workers: list[Any] = []

    def start(wrapped: list[Any]) -> None:
        have_nemo_rl(wrapped[0])
        from megatron_llep.integration.nemo_rl_worker import LLEPPolicyWorker

        overrides = {"llep": EAGER, "moe_router_dtype": "fp32"}
        config = {"megatron_cfg": {"model_overrides": overrides, "enabled": True}}
        workers.append(LLEPPolicyWorker(config, "tokenizer", worker_sharding_annotations=None))
        assert overrides["llep"] is EAGER, "the caller's configuration stays"

    def end(chunks: Any) -> tuple[Any, Any]:
        (worker,) = workers
        assert worker.cfg["megatron_cfg"]["model_overrides"] == {"moe_router_dtype": "fp32"}
        assert worker.offload_before_refit() == "offloaded"
        return worker.train(None, None)["moe_metrics"], worker.finish_train_step()

    llep = train(replace(RUN, prepare_wrapped=start), observe=end)
    assert_same_run(llep, train(RUN))
    return llep.observed


def test_nemo_rl_trains_a_model_that_is_wrapped():
    for metrics, again in run_ranks(train_as_nemo_rl, 2):
        assert metrics.keys() > {"load_balancing_loss", *(f"llep/{name}" for name in NAMES)}
        assert all(name.startswith("llep/") for name in metrics.keys() - {"load_balancing_loss"})
        assert metrics["llep/lent_experts"] > 0
        assert again == {}, "a step's metrics are read once"


def test_nemo_rl_starts_our_workers(monkeypatch):
    from megatron_llep.integration import nemo_rl

    environments = {nemo_rl._PLAIN: "uv run --extra mcore"}
    registry = ModuleType(nemo_rl._REGISTRY)
    registry.ACTOR_ENVIRONMENT_REGISTRY = environments  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, nemo_rl._REGISTRY, registry)
    make = nemo_rl.llep_policy(lambda **settings: settings)
    assert make(config=1) == {"config": 1, "worker_extension_cls_fqn": nemo_rl.WORKER}
    assert environments[nemo_rl.WORKER] == "uv run --extra mcore"
    environments.clear()
    with pytest.raises(SeamError, match=r"nemo-rl .* environment of"):
        nemo_rl.llep_policy(lambda **settings: settings)
