"""The settings that are tried, each an `LLEPConfig`, and the flags that ask for one."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any

from megatron_llep.config import LEND_TO, LLEPConfig, flag_of
from megatron_llep.offline.nodes import Nodes

TOLERANCES = (0.02, 0.05, 0.1, 0.25, 0.5)
CAPACITY_FACTORS = (1.0, 1.25)
MIN_TOKENS = (64, 1024, 4096)
THRESHOLDS = (None, 1.2, 1.5, 2.0, 3.0)
"""None: the planner's own."""
MAX_FOREIGN = (1, 2, 4, 8)
"""And as many as are allowed."""

KEPT = (
    "token_assignment",
    "dispatcher",
    "foreign_weights",
    "grad_dtype",
    "expert_gemm",
    "scatter_from",
)
"""What a run's settings are taken over from: they say how experts travel and are computed."""
TUNED = (
    "planner",
    "tolerance",
    "capacity_factor",
    "min_tokens_per_gemm",
    "imbalance_threshold",
    "cost_model",
    "max_foreign_experts",
    "ranks_per_node",
    "lend_to",
)

_IGNORED = {
    "tolerant": ("capacity_factor", "min_tokens_per_gemm", "cost_model"),
    "exact": ("tolerance", "capacity_factor", "min_tokens_per_gemm", "cost_model"),
    "lla": ("tolerance", "cost_model"),
    "auto": ("tolerance", "capacity_factor", "min_tokens_per_gemm", "imbalance_threshold"),
}
"""Of each planner that is tried."""


def keep_settings(recorded: dict[str, Any]) -> LLEPConfig:
    """The defaults, with what of a run's settings is not tuned.

    Raises:
        ValueError: the run spread tokens over replicas, which a replay of counts cannot undo.
    """
    if recorded.get("replicas", "none") != "none":
        raise ValueError(
            f"recorded with --moe-llep-replicas {recorded['replicas']}: what is lent after that "
            "cannot be replayed by itself; record a run without"
        )
    return LLEPConfig(**{name: recorded[name] for name in KEPT if name in recorded})


def make_grid(
    base: LLEPConfig,
    *,
    experts_per_rank: int,
    mean_load: float,
    machine: str,
    nodes: Sequence[dict[str, Any]] = ({},),
    max_foreign: int | None = None,
) -> list[LLEPConfig]:
    """All settings that are tried, simple ones first.

    Args:
        base: what is not tuned.
        experts_per_rank: more cannot be borrowed.
        mean_load: pairs of a rank; `lla` lends no expert for so many tokens or more.
        machine: what planner auto is told.
        nodes: what planners are told of them, of `list_nodes`.
        max_foreign: the most experts that a rank may borrow; None: no bound.

    Raises:
        ValueError: the bound is below 1.
    """
    if max_foreign is not None and max_foreign < 1:
        raise ValueError(
            f"--max-foreign {max_foreign}: give 1 or more; to lend nothing, leave out "
            "--moe-llep in training"
        )
    unbounded = max_foreign is None or max_foreign >= experts_per_rank
    most = experts_per_rank if unbounded or max_foreign is None else max_foreign
    bounds = [None if unbounded else most, *(n for n in MAX_FOREIGN if n < most)]
    return [
        replace(base, **planner, **told, max_foreign_experts=bound)
        for told, bound, planner in product(nodes, bounds, _list_planners(mean_load, machine))
    ]


def list_nodes(nodes: Nodes, ranks_per_host: int | None = None) -> list[dict[str, Any]]:
    """What planners may be told of nodes: what they are; each to balance itself; that there is one.

    Args:
        nodes: as they are.
        ranks_per_host: what `--moe-llep-ranks-per-node auto` finds, which need not be told; None
            where nobody knows.
    """
    one = nodes.num_ranks
    if ranks_per_host is None and nodes.number == 1:
        ranks_per_host = one

    def tell(ranks_per_node: int) -> int | None:
        return None if ranks_per_node == ranks_per_host else ranks_per_node

    if nodes.number == 1:
        return [{"ranks_per_node": tell(one)}]
    told = tell(nodes.ranks_per_node)
    return [
        *({"ranks_per_node": told, "lend_to": to} for to in LEND_TO),
        {"ranks_per_node": tell(one)},
    ]


def _list_planners(mean_load: float, machine: str) -> Iterator[dict[str, Any]]:
    yield {"planner": "auto", "cost_model": machine}
    for threshold in THRESHOLDS:
        yield {"planner": "exact", "imbalance_threshold": threshold}
        for tolerance in TOLERANCES:
            if threshold is None or threshold > 1 + tolerance:
                yield {
                    "planner": "tolerant",
                    "tolerance": tolerance,
                    "imbalance_threshold": threshold,
                }
        for factor, tokens in product(CAPACITY_FACTORS, MIN_TOKENS):
            if tokens < mean_load:
                yield {
                    "planner": "lla",
                    "capacity_factor": factor,
                    "min_tokens_per_gemm": tokens,
                    "imbalance_threshold": threshold,
                }


def list_flags(setting: LLEPConfig) -> dict[str, object]:
    """Flag -> value of all that is tuned or kept, defaults too: nothing below shows through.

    What the planner ignores, and what has no value, is None: the flag is left out. So are nodes
    that are found, and lending to any.
    """
    unset = (*_IGNORED[setting.planner], *(("lend_to",) if setting.lend_to == "any_node" else ()))
    flags: dict[str, object] = {flag_of("enabled"): True}
    for name in (*TUNED, *KEPT):
        flags[flag_of(name)] = None if name in unset else getattr(setting, name)
    return flags


def describe_setting(setting: LLEPConfig) -> str:
    """The planner, then what differs from the defaults, in words of the flags."""
    words: list[str] = [setting.planner]
    for each in fields(LLEPConfig):
        value = getattr(setting, each.name)
        if each.name in (*TUNED[1:], *KEPT) and value != each.default and each.name != "cost_model":
            words.append(f"{each.name.replace('_', '-')} {value}")
    return ", ".join(words)


def count_flags(setting: LLEPConfig) -> int:
    """How many numbers differ from the defaults."""
    return sum(getattr(setting, each.name) != each.default for each in fields(LLEPConfig))
