"""What LLEP refuses, at start-up and by flag: a wrong combination must never train silently."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.config import LLEPConfig, flag_of
from megatron_llep.experts.changes import check_not_sharded
from megatron_llep.experts.grouped_mm import check_convertible
from megatron_llep.experts.kinds import make_lendable
from megatron_llep.experts.precision import find_chosen_recipes
from megatron_llep.experts.quantised import check_lendable
from megatron_llep.integration.settings.flex import (
    FP8_WITH_HYBRIDEP,
    find_flex_refusals,
    find_missing_package,
    list_installed,
)
from megatron_llep.integration.settings.refused import FP8_RECIPES
from megatron_llep.integration.settings.table import find_refusals
from megatron_llep.planner.cost.presets import get_cost_model

if TYPE_CHECKING:
    from megatron.core.transformer.moe.moe_layer import MoELayer


def check_config(config: TransformerConfig, llep: LLEPConfig) -> None:
    """Check a model's configuration, or Megatron's arguments under its names, before it is built.

    Raises:
        ValueError: names flag, value and remedy.
    """
    for refusal in find_all_refusals(config, llep):
        raise ValueError(refusal)
    if llep.dispatcher == "flex" and config.expert_model_parallel_size > 1:
        for missing in find_missing_package(config):
            raise ValueError(missing)


def find_all_refusals(config: TransformerConfig, llep: LLEPConfig) -> Iterator[str]:
    """What `check_config` refuses: flag, value and remedy of each."""
    ep_size, num_experts = config.expert_model_parallel_size, config.num_moe_experts
    if not num_experts:
        yield "--moe-llep needs experts: set --num-experts, or leave --moe-llep out"
        return
    if ep_size == 1:
        return  # plain Megatron runs
    if num_experts % ep_size:
        yield (
            f"--num-experts {num_experts}: must be a multiple of "
            f"--expert-model-parallel-size {ep_size}"
        )
        return
    native = num_experts // ep_size
    if llep.max_foreign_experts is not None and llep.max_foreign_experts > native:
        yield (
            f"--moe-llep-max-foreign-experts {llep.max_foreign_experts}: a rank hosts {native} "
            f"experts (--num-experts {num_experts} / --expert-model-parallel-size {ep_size}) and "
            "may borrow at most as many"
        )
    if llep.observes:
        return  # nothing of Megatron's is replaced
    if getattr(config, "use_kitchen", False):  # arguments do not have it
        yield (
            "--kitchen-config-file: lent experts are not quantised by Kitchen; leave the flag out, "
            "and --kitchen-recipe-number (in Python the field is use_kitchen)"
        )
    if llep.dispatcher == "flex":
        yield from find_flex_refusals(config, llep.replicas)
    yield from find_refusals(config)


def check_layer(layer: "MoELayer", llep: LLEPConfig) -> None:
    """Check a built MoE layer.

    Raises:
        ValueError: names what does not fit and the way out.
    """
    check_config(layer.config, llep)
    check_not_sharded(layer.experts)
    if llep.expert_gemm == "grouped_mm":
        check_convertible(layer.experts)
    experts = make_lendable(layer.experts)
    if layer.config.fp8 and not experts.runs_in_fp8:
        raise ValueError(
            f"--fp8-format {layer.config.fp8}: not supported with --moe-llep for experts of "
            f"{type(layer.experts).__name__}; use --moe-grouped-gemm with Transformer Engine, or "
            "train in bf16, fp16 or fp32"
        )
    pads = llep.dispatcher == "flex" and layer.config.moe_flex_dispatcher_backend == "hybridep"
    for name, recipe in find_chosen_recipes(layer.experts):
        if pads:
            raise ValueError(
                f"--te-precision-config-file: it chooses {recipe} for experts.{name}; "
                f"{FP8_WITH_HYBRIDEP}"
            )
        if recipe not in FP8_RECIPES or not experts.runs_in_fp8:
            raise ValueError(
                f"--te-precision-config-file: it chooses {recipe} for experts.{name}; not "
                f"supported with --moe-llep for {type(layer.experts).__name__}: leave the experts "
                f"out of its matchers, or use --moe-grouped-gemm and {' or '.join(FP8_RECIPES)}"
            )
    check_lendable(layer.experts)
    experts.describe()


def check_same_on_all_ranks(llep: LLEPConfig, group: dist.ProcessGroup | None = None) -> None:
    """Check that all ranks of the group have the same settings; all of them must call it.

    Args:
        llep: this rank's settings.
        group: default: all ranks.

    Raises:
        ValueError: names the flags that differ, with each rank's value; on every rank.
    """
    settings = _describe(llep)
    digest = hashlib.sha256(repr(settings).encode()).digest()[:8]
    mine = torch.tensor([int.from_bytes(digest, "big", signed=True)])
    if torch.cuda.is_available():
        mine = mine.cuda()
    digests = mine.new_empty(dist.get_world_size(group))
    dist.all_gather_into_tensor(digests, mine, group=group)
    if (digests == mine).all():
        return
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, settings, group=group)
    differing = {
        name: [each[name] for each in everyone]
        for name in everyone[0]
        if len({each[name] for each in everyone}) > 1
    }
    lines = "; ".join(f"{flag_of(name)}: {values}" for name, values in differing.items())
    raise ValueError(f"LLEP settings differ between ranks, give all the same: {lines}")


def refuse_on_all_ranks(refusal: str | None) -> None:
    """Raise on every rank if any rank refuses something; all of them must call it.

    So none of them goes on to wait for one that has stopped.

    Args:
        refusal: what this rank refuses, where, and the way out; None if nothing.

    Raises:
        ValueError: the first rank's refusal, and which ranks refuse.
    """
    refusals: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(refusals, refusal)
    ranks = [rank for rank, each in enumerate(refusals) if each is not None]
    if ranks:
        others = f"; so do ranks {ranks[1:]}" if ranks[1:] else ""
        raise ValueError(f"{refusals[ranks[0]]}: rank {ranks[0]} refuses it{others}")


def _describe(llep: LLEPConfig) -> dict[str, object]:
    """All settings by field, with what else has to be the same on all ranks.

    A cost model with a hash of its numbers, or why it cannot be read; flex with the back ends that
    are installed.
    """
    settings = dataclasses.asdict(llep)
    if llep.dispatcher == "flex":
        settings["dispatcher"] = f"flex (installed: {', '.join(list_installed()) or 'none'})"
    if llep.cost_model is not None:
        try:
            found = get_cost_model(llep.cost_model).digest()
        except ValueError as error:  # told by all ranks together, not by one while others wait
            found = str(error)
        settings["cost_model"] = f"{llep.cost_model} ({found})"
    return settings
