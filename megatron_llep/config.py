"""Everything a user can set: one frozen dataclass, also the source of the `--moe-llep-*` help."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_llep.lending.fan_out import SCATTER_FROM
from megatron_llep.planner import ORDERS, PLANNERS

FOREIGN_WEIGHTS = ("keep", "refetch")
REPLICAS = ("none", "expert-dp")
GRAD_DTYPES = ("fp32", "param")
LEND_TO = ("any_node", "own_node")
EXPERT_GEMMS = ("megatron", "grouped_mm")
DISPATCHERS = ("alltoall", "flex")
PLAN_AHEAD = ("auto", "off")
OBSERVE = "observe"
"""In place of a planner: nothing is planned, nor replaced."""


@dataclass(frozen=True, kw_only=True)
class LLEPConfig:
    """Least-Loaded Expert Parallelism (arXiv 2601.17111): balance experts across EP ranks."""

    enabled: bool = True
    """Balance the experts' work across expert-parallel ranks: ranks with too many tokens lend the
    weights of some experts, with the tokens that go to them, to ranks with too few. Routing and
    results are those of plain expert parallelism."""

    planner: Literal["tolerant", "exact", "lla", "lp", "auto", "observe"] = "tolerant"
    """How lent experts are chosen. tolerant: as few as bring every rank within --moe-llep-tolerance
    of the mean load. exact: every rank computes the same number of tokens, with at most one lender
    per borrower. lla: Algorithms 2 and 3 of the paper. lp: nothing is lent; tokens
    are spread over replicas so that the largest load is least, see --moe-llep-replicas. auto: plain
    expert parallelism or a plan, whichever --moe-llep-cost-model predicts to be fastest. observe:
    Megatron's own layers run as without --moe-llep; the log shows how uneven routing is, and what
    the planners that lend would have gained."""

    tolerance: float = 0.05
    """Planner tolerant: part of the mean load by which a rank's load may exceed it."""

    capacity_factor: float = 1.0
    """Planner lla, the paper's alpha: a rank takes tokens up to this many times the mean load."""

    min_tokens_per_gemm: int = 1024
    """Planner lla, the paper's m: an expert is not lent for fewer tokens than this."""

    imbalance_threshold: float | None = None
    """Plain expert parallelism runs where the most loaded rank has less than this many times the
    mean load. Default: for lla 1.3, the paper's lambda; else 1 + tolerance. Planner auto does
    without."""

    cost_model: str | None = None
    """Planner auto, in place of the numbers above: a file that `python -m megatron_llep
    calibrate` wrote on this kind of machine, or a preset from data sheets, h100 or h200. Planner
    observe predicts gains for it; default there: h200."""

    replicas: Literal["none", "expert-dp"] = "none"
    """Where a token may be computed without moving weights. none: by the expert of its own
    expert-parallel group. expert-dp: by any replica of the expert that expert data parallelism
    holds; what replicas cannot even out is lent among all these ranks, if the planner lends."""

    max_foreign_experts: int | None = None
    """Most experts a rank may borrow for one layer of one micro-batch, which bounds the memory
    they take. Default: as many as a rank hosts."""

    ranks_per_node: int | None = None
    """Ranks on each node, of those that share tokens. Planners tolerant and exact then plan for
    what crosses between nodes, and tokens stay in their node where they can. auto (default): as the
    ranks' hostnames tell. A number: where a domain of fast links is larger, or smaller, than a
    host."""

    lend_to: Literal["any_node", "own_node"] = "any_node"
    """own_node: experts are lent inside a node only (see --moe-llep-ranks-per-node), so that each
    balances itself."""

    token_assignment: Literal["local_first", "rank_order"] = "local_first"
    """Which tokens of a lent expert go where. local_first: tokens stay on their rank where its
    quota allows, which saves traffic. rank_order: sources fill holders in rank order, as the
    paper's reference code does."""

    dispatcher: Literal["alltoall", "flex"] = "alltoall"
    """How tokens travel. alltoall: by all-to-all, whichever dispatcher the model asks for. flex: by
    the back end that --moe-token-dispatcher-type flex and --moe-flex-dispatcher-backend (deepep or
    hybridep) name, which sends a token once to a rank with several of its experts; tested on a
    CPU with a stand-in for the back ends' buffers, not yet run on GPUs."""

    foreign_weights: Literal["keep", "refetch"] | None = None
    """Where lent weights are between forward and backward. keep: with their borrower. refetch:
    they are freed after forward and lent again in backward, so that memory does not grow with
    layers and micro-batches in flight. Default: refetch under pipeline parallelism, else keep."""

    grad_dtype: Literal["fp32", "param"] = "fp32"
    """Precision in which the weight gradients of lent experts are sent home: fp32, or that of the
    parameters (half the traffic for bf16 models)."""

    plan_ahead: Literal["auto", "off"] = "auto"
    """auto: where routing is known before layers run, as --moe-enable-routing-replay replays it,
    the counts of all layers are exchanged at once at the start of a forward, and experts are lent
    one layer ahead. off: each layer counts and lends for itself."""

    expert_gemm: Literal["megatron", "grouped_mm"] = "megatron"
    """How a rank computes its experts. megatron: as Megatron's own module does. grouped_mm: those
    of SequentialMLP, which run one after another, in torch's grouped GEMMs instead: for many small
    experts where there is no Transformer Engine."""

    scatter_from: int = SCATTER_FROM
    """An expert that so many ranks borrow, or more, is sent in shards that they exchange with each
    other, and its gradients come home the same way: its home's link then carries it once instead of
    once per borrower, at the price of a second exchange. Fewer bytes one after another from 2 on;
    2 for large experts or slow links. 0: each borrower is sent all of it."""

    record: str | None = None
    """A folder for a recording of the routing, beside the training: for each layer and micro-batch
    the tokens of each rank for each expert, and what was lent. `python -m megatron_llep plan` and
    simulate read it. One folder a run; a run that is resumed goes on in its own. Needs pip install
    megatron-llep[record]."""

    def __post_init__(self) -> None:
        """Reject values that no model could use.

        Raises:
            ValueError: names the flag, its value and what it may be.
        """
        if self.ranks_per_node == "auto":
            object.__setattr__(self, "ranks_per_node", None)
        _require_choice("--moe-llep-planner", self.planner, (*PLANNERS, OBSERVE))
        _require_choice("--moe-llep-replicas", self.replicas, REPLICAS)
        _require(
            self.planner != "lp" or self.replicas != "none",
            "--moe-llep-planner",
            self.planner,
            "it lends nothing, but spreads tokens over replicas: give --moe-llep-replicas "
            "expert-dp, or choose another planner",
        )
        _require(
            self.planner != "auto" or self.cost_model is not None,
            "--moe-llep-planner",
            self.planner,
            "it predicts times: give --moe-llep-cost-model a file that `python -m megatron_llep "
            "calibrate` wrote, or choose another planner",
        )
        for flag, value, plain in (
            ("--moe-llep-replicas", self.replicas, "none"),
            ("--moe-llep-dispatcher", self.dispatcher, "alltoall"),
            ("--moe-llep-expert-gemm", self.expert_gemm, "megatron"),
        ):
            _require(
                not self.observes or value == plain,
                flag,
                value,
                f"--moe-llep-planner {OBSERVE} lets Megatron run as it is: leave the flag out, or "
                "choose another planner",
            )
        _require_choice("--moe-llep-token-assignment", self.token_assignment, ORDERS)
        _require_choice("--moe-llep-dispatcher", self.dispatcher, DISPATCHERS)
        if self.foreign_weights is not None:
            _require_choice("--moe-llep-foreign-weights", self.foreign_weights, FOREIGN_WEIGHTS)
        _require_choice("--moe-llep-grad-dtype", self.grad_dtype, GRAD_DTYPES)
        _require_choice("--moe-llep-lend-to", self.lend_to, LEND_TO)
        _require_choice("--moe-llep-plan-ahead", self.plan_ahead, PLAN_AHEAD)
        _require_choice("--moe-llep-expert-gemm", self.expert_gemm, EXPERT_GEMMS)
        _require(
            math.isfinite(self.tolerance) and self.tolerance >= 0,
            "--moe-llep-tolerance",
            self.tolerance,
            "it is a part of the mean load: give a finite number, 0 or more",
        )
        _require(
            self.ranks_per_node is None or self.ranks_per_node >= 1,
            "--moe-llep-ranks-per-node",
            self.ranks_per_node,
            "give a number of ranks, 1 or more, or auto",
        )
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
            self.imbalance_threshold is None or self.imbalance_threshold >= 0,  # False for NaN too
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
        _require(
            self.scatter_from == 0 or self.scatter_from >= 2,
            "--moe-llep-scatter-from",
            self.scatter_from,
            "give a number of borrowers, 2 or more, or 0 to send experts whole",
        )
        _require(self.record != "", "--moe-llep-record", self.record, "give a folder")

    @property
    def observes(self) -> bool:
        """Whether plain Megatron runs, with hooks that count."""
        return self.planner == OBSERVE

    @property
    def replaces(self) -> bool:
        """Whether LLEP's layers run in the place of Megatron's."""
        return self.enabled and not self.observes


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
