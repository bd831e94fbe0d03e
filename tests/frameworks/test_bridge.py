"""Megatron-Bridge: its own `pretrain`, with the snippets of docs/frameworks.md."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bridge_runs import STEPS, BridgeRun, make_config, make_provider, run_bridge
from framework_doc import get_blocks
from megatron.bridge import AutoBridge
from megatron.bridge.models.gpt.gpt_builder import GPTModelConfig
from megatron.bridge.models.model_provider import ModelProviderMixin
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.utils import create_peft_hook
from megatron.bridge.training import callbacks as bridge_callbacks
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides
from megatron.core import parallel_state
from tiny_models import FLOAT32, LAYERS, VOCABULARY, make_folder

from megatron_llep import LLEPConfig, release_buffers
from megatron_llep.integration.bridge import use_llep
from megatron_llep.integration.frameworks import SeamError
from megatron_llep.metrics import METRICS, PREFIX
from megatron_llep.training.hf.bridge import import_bridge
from support.comparison import get_relative_difference
from support.llep import note_decisions
from support.ranks import run_ranks
from support.routing import Routing, force_routing

SNIPPET, HOOK = get_blocks("Megatron-Bridge", "python")
EAGER = {"planner": "exact", "imbalance_threshold": 1.0}


def start_plain(pretrain: Any, config: Any, forward_step: Any) -> None:
    pretrain(config, forward_step)


def start_documented(pretrain: Any, config: Any, forward_step: Any) -> None:
    config.llep = EAGER
    exec(SNIPPET, {"pretrain": pretrain, "config": config, "forward_step": forward_step})


def start_by_hook(pretrain: Any, config: Any, forward_step: Any) -> None:
    exec(HOOK, {"provider": config.model})
    pretrain(config, forward_step)


def train(rank: int, size: int, folder: Any) -> dict[str, BridgeRun]:
    starts = {"plain": start_plain, "documented": start_documented, "hook": start_by_hook}
    return {
        name: run_bridge(make_config(folder / name, make_provider()), start)
        for name, start in starts.items()
    }


def test_pretrain_is_that_of_bridge(tmp_path):
    first, last = run_ranks(train, 2, tmp_path, timeout=600)
    plain = first["plain"].losses
    assert len(plain) == STEPS
    for rank in (first, last):
        for name in ("documented", "hook"):
            assert rank[name].losses == pytest.approx(plain, rel=1e-5)
    for metric in METRICS:
        assert len(last["documented"].logged[PREFIX + metric.name]) == STEPS
        assert f"{PREFIX}{metric.name}: " in first["documented"].printed
    assert last["documented"].lent > 0
    assert last["hook"].lent > 0
    assert not any(name.startswith(PREFIX) for name in last["plain"].logged)


def test_settings_from_yaml_and_overrides(tmp_path):
    config = make_config(tmp_path, make_provider())
    config.llep = {}
    (tmp_path / "run.yaml").write_text("llep:\n  planner: lla\n  capacity_factor: 1.5\n")
    overrides = ["llep.capacity_factor=2", "+llep.scatter_from=0"]
    config = process_config_with_overrides(config, str(tmp_path / "run.yaml"), overrides)
    llep = use_llep(config).llep
    assert llep == LLEPConfig(planner="lla", capacity_factor=2, scatter_from=0)
    assert config.model.pre_wrap_hook is not None


def test_overrides_that_come_too_late(tmp_path):
    transformer = make_provider()
    model = GPTModelConfig(transformer=transformer, vocab_size=64)
    config = make_config(tmp_path, model)
    callback = use_llep(config)
    assert model.pre_wrap_hooks == [callback]
    process_config_with_overrides(config, cli_overrides=["train.train_iters=2"])
    with pytest.raises(ValueError, match="after overrides"):
        callback.on_train_start(None)


@pytest.mark.parametrize(
    ("owner", "name", "missing"),
    [
        (ModelProviderMixin, "register_pre_wrap_hook", "GPTModelProvider.register_pre_wrap_hook"),
        (bridge_callbacks, "VALID_EVENTS", "megatron.bridge.training.callbacks.VALID_EVENTS"),
    ],
)
def test_a_version_whose_seam_has_moved(owner, name, missing, tmp_path, monkeypatch):
    config = make_config(tmp_path, make_provider())
    monkeypatch.delattr(owner, name)
    with pytest.raises(SeamError, match=f"megatron-bridge [0-9.]+ has no {re.escape(missing)}"):
        use_llep(config)


def export(rank: int, size: int, folder: Path, layout: dict[str, int]) -> tuple[int, float]:
    """Weights after two steps, of a model with LLEP and of a plain one with the same parameters."""
    import_bridge()  # as this project's own layers are known to Bridge
    bridge = AutoBridge.from_hf_pretrained(str(folder))
    models = []
    lent: list[Any] = []
    for llep in (True, False):
        provider = bridge.to_megatron_provider(load_weights=True)
        for name, value in (LAYERS | FLOAT32 | layout).items():
            setattr(provider, name, value)
        provider.finalize()
        if not parallel_state.is_initialized():
            provider.initialize_model_parallel(seed=1)
        if llep:
            exec(HOOK, {"provider": provider})
        (model,) = provider.provide_distributed_model(wrap_with_ddp=False, bf16=False)
        models.append(model)
    with_llep, plain = models
    note_decisions([with_llep], lent)
    force_routing([with_llep], Routing("hot"))
    tokens = torch.randint(VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(rank))
    positions = torch.arange(32).expand(2, -1)
    for _ in range(2):
        with_llep(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean().backward()
        with torch.no_grad():
            for weight in with_llep.parameters():
                if weight.grad is not None:
                    weight -= 0.1 * weight.grad
                    weight.grad = None
    release_buffers(with_llep)
    plain.load_state_dict(with_llep.state_dict())
    one, other = (dict(bridge.export_hf_weights([model], show_progress=False)) for model in models)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    return len(one), sum(len(decision.plan.transfers) for decision in lent)


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
                "sequence_parallel": True,
            },
        ),
    ],
)
def test_export_is_that_of_a_plain_model(ranks, layout, tmp_path):
    make_folder(tmp_path)
    results = run_ranks(export, ranks, tmp_path, layout, timeout=300)
    # Of each layer 6 of attention and norms, the router, 3 of each expert; and 3 of the model.
    assert {tensors for tensors, _ in results} == {2 * (8 + 1 + 3 * 8) + 3}
    assert all(lent > 0 for _, lent in results)


def adapt(rank: int, size: int, share: bool) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """Gradients of Bridge's adapters in a plain model and in one with LLEP; experts lent."""
    gradients: list[list[torch.Tensor]] = []
    lent: list[Any] = []
    weights: dict[str, torch.Tensor] = {}
    for llep in (False, True):
        provider = make_provider()
        provider.finalize()
        if not parallel_state.is_initialized():
            provider.initialize_model_parallel(seed=1)
        lora = LoRA(target_modules=["linear_fc1", "linear_fc2"], dim=4, share_expert_adapters=share)
        provider.register_pre_wrap_hook(create_peft_hook(lora, training=True))
        if llep:
            use_llep(SimpleNamespace(model=provider, peft=lora, llep=EAGER))
        (model,) = provider.provide_distributed_model(wrap_with_ddp=False, bf16=False)
        if llep:
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.copy_(weights[name])
            note_decisions([model], lent)
        else:
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if "adapter" in name:
                        weight.normal_(std=0.1)  # one half is zero
            weights = {name: weight.detach() for name, weight in model.named_parameters()}
        force_routing([model], Routing("hot"))
        tokens = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(rank))
        positions = torch.arange(32).expand(2, -1)
        model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean().backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all("adapter" in name for name in trained)
        gradients.append(
            [torch.zeros(1) if grad is None else grad for _, grad in sorted(trained.items())]
        )
    return gradients[0], gradients[1], sum(len(decision.plan.transfers) for decision in lent)


@pytest.mark.parametrize("share", [True, False])
def test_adapters_of_bridge(share):
    """Of experts that run one by one; what is shared by grouped ones needs Transformer Engine."""
    for plain, llep, lent in run_ranks(adapt, 2, share, timeout=300):
        assert lent > 0
        for mine, expected in zip(llep, plain, strict=True):
            assert get_relative_difference(mine, expected) <= 1e-4
