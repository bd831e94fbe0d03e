"""Rotary embeddings as a `config.json` describes them, in transformers' old way and the new one.

Until transformers 4 there are `rope_theta` and `rope_scaling`, from 5 on `rope_parameters`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_llep.training.hf.config_file import HFConfig


@dataclass(frozen=True)
class Yarn:
    """YaRN's numbers, under Megatron's names; defaults are those of transformers."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float
    truncate: bool


@dataclass(frozen=True)
class Rope:
    """The base, and YaRN where it is on."""

    base: int
    yarn: Yarn | None


def read_rope(config: HFConfig) -> Rope:
    """Read both ways of writing it.

    Raises:
        ValueError: a kind of scaling that Megatron does not have, or a base that is no integer.
    """
    parameters: dict[str, Any] = dict(config.get("rope_scaling", default={}))
    parameters |= config.get("rope_parameters", default={})
    base = parameters.get("rope_theta", config.get("rope_theta", default=10000.0))
    if base != int(base):
        raise config.refuse("rope_theta", base, "Megatron's --rotary-base takes an integer")
    part = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", default=1))
    if part != 1:
        raise config.refuse("partial_rotary_factor", part, "not known for this architecture")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return Rope(int(base), None)
    if kind != "yarn":
        raise config.refuse("rope_type", kind, "only default and yarn are known here")
    return Rope(int(base), _read_yarn(config, parameters))


def _read_yarn(config: HFConfig, parameters: Mapping[str, Any]) -> Yarn:
    def number(name: str, default: float) -> float:
        value = parameters.get(name)
        return default if value is None else float(value)

    if "factor" not in parameters:
        raise ValueError(f"{config.path}: YaRN without a factor; add it to rope_parameters")
    original = parameters.get("original_max_position_embeddings")
    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if not (mscale and mscale_all_dim):  # transformers uses both or none
        mscale, mscale_all_dim = 1.0, 0.0
    yarn = Yarn(
        factor=number("factor", 1.0),
        original_positions=int(original or config.require("max_position_embeddings")),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        mscale=float(mscale),
        mscale_all_dim=float(mscale_all_dim),
        truncate=bool(parameters.get("truncate", True)),
    )
    given = parameters.get("attention_factor")
    if given is not None and not math.isclose(given, _attention_factor(yarn), rel_tol=1e-6):
        raise config.refuse(
            "attention_factor",
            given,
            f"Megatron computes {_attention_factor(yarn):.6g} from factor and mscale",
        )
    return yarn


def _attention_factor(yarn: Yarn) -> float:
    def scale(weight: float) -> float:
        return 1.0 if yarn.factor <= 1 else 0.1 * weight * math.log(yarn.factor) + 1.0

    return scale(yarn.mscale) / scale(yarn.mscale_all_dim)
