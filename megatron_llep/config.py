"""Everything a user can set: one frozen dataclass, also the source of the `--moe-llep-*` help."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_llep.planner import ORDERS, PLANNERS

FOREIGN_WEIGHTS = ("keep", "refetch")
GRAD_DTYPES = ("fp32", "param")


@dataclass(frozen=True, kw_only=True)
class LLEPConfig:
    """Least-Loaded Expert Parallelism (arXiv 2601.17111): balance experts across EP ranks."""

    enabled: bool = True
    """Balance the experts' work across expert-parallel ranks: ranks with too many tokens lend the
    weights of some experts, with the tokens that go to them, to ranks with too few. Routing and
    results are those of plain expert parallelism."""

    planner: Literal["exact", "lla"] = "exact"
    """How lent experts are chosen. exact: every rank computes the same number of tokens, with at
    most one lender per borrower. lla: Algorithms 2 and 3 of the paper."""

    capacity_factor: float = 1.0
    """Planner lla, the paper's alpha: a rank takes tokens up to this many times the mean load."""

    min_tokens_per_gemm: int = 1024
    """Planner lla, the paper's m: an expert is not lent for fewer tokens than this."""

    imbalance_threshold: float = 1.3
    """The paper's lambda: plain expert parallelism runs where the most loaded rank has less than
    this many times the mean load."""

    max_foreign_experts: int | None = None
    """Most experts a rank may borrow for one layer of one micro-batch, which bounds the memory
    they take. Default: as many as a rank hosts."""

    token_assignment: Literal["local_first", "rank_order"] = "local_first"
    """Which tokens of a lent expert go where. local_first: tokens stay on their rank where its
    quota allows, which saves traffic. rank_order: sources fill holders in rank order, as the
    paper's reference code does."""

    foreign_weights: Literal["keep", "refetch"] | None = None
    """Where lent weights are between forward and backward. keep: with their borrower. refetch:
    they are freed after forward and lent again in backward, so that memory does not grow with
    layers and micro-batches in flight. Default: refetch under pipeline parallelism, else keep."""

    grad_dtype: Literal["fp32", "param"] = "fp32"
    """Precision in which the weight gradients of lent experts are sent home: fp32, or that of the
    parameters (half the traffic for bf16 models)."""

    def __post_init__(self) -> None:
        """Reject values that no model could use.

        Raises:
            ValueError: names the flag, its value and what it may be.
        """
        _require_choice("--moe-llep-planner", self.planner, tuple(PLANNERS))
        _require_choice("--moe-llep-token-assignment", self.token_assignment, ORDERS)
        if self.foreign_weights is not None:
            _require_choice("--moe-llep-foreign-weights", self.foreign_weights, FOREIGN_WEIGHTS)
        _require_choice("--moe-llep-grad-dtype", self.grad_dtype, GRAD_DTYPES)
        _require(
            math.isfinite(self.capacity_factor) and self.capacity_factor >= 1,
            "--moe-llep-capacity-factor",
            self.capacity_factor,
            "it is a multiple of the mean load: give a finite number of at least 1",
        )
        _require(
            self.min_tokens_per_gemm >= 0,
            "--moe-llep-min-tokens-per-gemm",
            self.min_tokens_per_gemm,
            "give a number of tokens, 0 or more",
        )
        _require(
            self.imbalance_threshold >= 0,  # False for NaN too
            "--moe-llep-imbalance-threshold",
            self.imbalance_threshold,
            "give a multiple of the mean load, 0 or more (below 1: never fall back)",
        )
        _require(
            self.max_foreign_experts is None or self.max_foreign_experts >= 0,
            "--moe-llep-max-foreign-experts",
            self.max_foreign_experts,
            "give a number of experts, 0 or more, or leave it out",
        )


def flag_of(field_name: str) -> str:
    """The command-line flag of an LLEPConfig field."""
    suffix = "" if field_name == "enabled" else "-" + field_name.replace("_", "-")
    return "--moe-llep" + suffix


def _require(condition: bool, flag: str, value: object, remedy: str) -> None:
    """Raise a ValueError that names flag, value and remedy unless the condition holds."""
    if not condition:
        raise ValueError(f"{flag} {value}: {remedy}")


def _require_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless value is one of the choices."""
    _require(value in choices, flag, value, f"choose one of {', '.join(choices)}")
