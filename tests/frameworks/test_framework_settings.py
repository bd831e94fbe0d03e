"""Settings as frameworks keep them, and seams that have moved; no framework is needed."""

import json
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

from megatron_llep.config import LLEPConfig
from megatron_llep.integration import bridge, ms_swift
from megatron_llep.integration.frameworks import (
    TRIED,
    SeamError,
    find_seam,
    settings_from,
    take_settings,
)


def test_settings_are_fields_by_name():
    given = json.loads('{"planner": "lla", "capacity_factor": 2, "max_foreign_experts": null}')
    assert settings_from(given, "llep") == LLEPConfig(planner="lla", capacity_factor=2)
    assert settings_from(None, "llep") == settings_from({}, "llep") == LLEPConfig()
    assert settings_from(False, "llep") == LLEPConfig(enabled=False)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"toleranse": 0.1}, "policy.llep.toleranse: no setting"),
        ({"tolerance": "1e-2"}, "policy.llep.tolerance '1e-2': give float or int"),
        ({"scatter_from": True}, "policy.llep.scatter_from True: give int"),
        ({"ranks_per_node": 1.5}, "policy.llep.ranks_per_node 1.5: give int or null"),
        ({"planner": "best"}, "--moe-llep-planner best"),
        ("exact", "policy.llep 'exact': give settings by name"),
    ],
)
def test_wrong_settings_are_named(given, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        settings_from(given, "policy.llep")


def test_what_goes_on_to_others_has_no_settings():
    overrides = {"llep": {"planner": "exact"}, "recompute_method": None}
    assert take_settings(overrides, "overrides").planner == "exact"
    assert overrides == {"recompute_method": None}
    assert take_settings(overrides, "overrides") == LLEPConfig()


def test_a_seam_that_is_missing_is_named_with_the_version(monkeypatch):
    part = ModuleType("some.part")
    part.Engine = SimpleNamespace(train=len)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some.part", part)
    monkeypatch.setitem(TRIED, "pytest", "1.0")
    assert find_seam("pytest", "some.part", "Engine", "train") is len
    for names, missing in (
        (("Engine", "test"), "some.part.Engine.test"),
        (("Motor", "train"), "some.part.Motor"),
    ):
        with pytest.raises(SeamError, match=re.escape(missing)) as caught:
            find_seam("pytest", "some.part", *names)
        assert f"pytest {pytest.__version__}" in str(caught.value)
        assert "tried was pytest 1.0" in str(caught.value)
    with pytest.raises(SeamError, match=r"no some\.where"):
        find_seam("pytest", "some.where")


def have(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def bridge_callbacks(monkeypatch):
    events = {"on_train_start", "on_train_step_end"}
    have(monkeypatch, "megatron.bridge.training.callbacks", VALID_EVENTS=events)
    return events


def test_bridge_has_its_settings_beside_the_recipe(bridge_callbacks):
    config = SimpleNamespace(model=SimpleNamespace(pre_wrap_hooks=[], post_wrap_hooks=[]))
    assert bridge.use_llep(config).llep == LLEPConfig()
    config.llep = {"planner": "exact"}
    callback = bridge.use_llep(config)
    assert callback.llep.planner == "exact"
    assert config.model.pre_wrap_hooks[-1] is callback
    config.llep["plan"] = "exact"
    with pytest.raises(ValueError, match=r"llep\.plan: no setting"):
        bridge.use_llep(config)


def test_bridge_puts_it_after_adapters(bridge_callbacks):
    hooks: list = []
    model = SimpleNamespace(register_post_wrap_hook=hooks.append, register_pre_wrap_hook=None)
    callback = bridge.use_llep(SimpleNamespace(model=model, peft=object()))
    assert hooks == [callback]


def test_bridge_without_hooks_or_events(bridge_callbacks):
    with pytest.raises(SeamError, match="register_pre_wrap_hook"):
        bridge.use_llep(SimpleNamespace(model=object()))
    bridge_callbacks.remove("on_train_start")
    with pytest.raises(SeamError, match="callback on_train_start"):
        bridge.use_llep(SimpleNamespace(model=SimpleNamespace(pre_wrap_hooks=[])))


def test_bridge_stops_what_would_train_without_llep(bridge_callbacks):
    config = SimpleNamespace(model=SimpleNamespace(pre_wrap_hooks=[]))
    callback = bridge.use_llep(config)
    config.model.pre_wrap_hooks = []  # as overrides do
    with pytest.raises(ValueError, match="hook was lost"):
        callback.on_train_start(None)


def test_ms_swift_without_callbacks(monkeypatch):
    class Callback:
        def on_log(self, logs):
            pass

    known: dict = {}
    have(monkeypatch, "swift.megatron.callbacks", megatron_callbacks_map=known)
    have(monkeypatch, "swift.megatron.callbacks.base", MegatronCallback=Callback)
    with pytest.raises(SeamError, match=r"MegatronCallback\.on_step_end"):
        ms_swift.register()
    Callback.on_step_end = Callback.on_log  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"register\.plan"):
        ms_swift.register(plan="exact")
    ms_swift.register(planner="exact")
    assert list(known) == ["llep"]
    Callback.__init__ = lambda self, trainer: None  # type: ignore[assignment, misc]
    with pytest.raises(SeamError, match="unwrapped_models"):
        known["llep"](object())
    have(monkeypatch, "swift.megatron.callbacks")
    with pytest.raises(SeamError, match="megatron_callbacks_map"):
        ms_swift.register()
