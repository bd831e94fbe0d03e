"""What `--moe-llep-dispatcher flex` asks of Megatron's flags, and of the machine."""

from collections.abc import Iterator
from typing import Any

_FLAG = "--moe-llep-dispatcher flex"
_LEAVE_OUT = "or leave --moe-llep-dispatcher out, and tokens go by all-to-all"
FP8_WITH_HYBRIDEP = (
    f"not supported with {_FLAG} and --moe-flex-dispatcher-backend hybridep, which would pad the "
    f"rows of experts that LLEP counts by its plan; use --moe-flex-dispatcher-backend deepep, "
    f"{_LEAVE_OUT}"
)
_PACKAGES = {
    "deepep": "deep_ep",
    "hybridep": "deep_ep of its branch hybrid-ep",
}
"""Of each back end that LLEP can use: where Megatron looks for it."""


def find_flex_refusals(source: Any, replicas: str) -> Iterator[str]:
    """What the setting refuses in a configuration: flag, value and way out of each.

    Args:
        source: a `TransformerConfig`, or Megatron's arguments under its names.
        replicas: the value of `--moe-llep-replicas`.
    """
    kind, back_end = source.moe_token_dispatcher_type, source.moe_flex_dispatcher_backend
    if kind != "flex":
        yield (
            f"{_FLAG}: the model has --moe-token-dispatcher-type {kind}; give "
            "--moe-token-dispatcher-type flex, with --moe-flex-dispatcher-backend "
            f"{' or '.join(_PACKAGES)}, {_LEAVE_OUT}"
        )
        return
    if back_end not in _PACKAGES:
        yield (
            f"{_FLAG}: not supported with --moe-flex-dispatcher-backend {back_end}, which is set "
            f"up once for a fixed number of experts and rows; use {' or '.join(_PACKAGES)}, "
            f"{_LEAVE_OUT}"
        )
    if source.overlap_moe_expert_parallel_comm:
        yield (
            f"--overlap-moe-expert-parallel-comm: not tried with {_FLAG}; leave it out, "
            f"{_LEAVE_OUT}"
        )
    if back_end == "hybridep" and replicas != "none":
        yield (
            f"--moe-llep-replicas {replicas}: not supported with {_FLAG} and "
            "--moe-flex-dispatcher-backend hybridep, whose one buffer is of the group that used it "
            f"first, which may be that of plain layers; use deepep, {_LEAVE_OUT}"
        )
    if back_end == "hybridep" and source.fp8:
        yield f"--fp8-format {source.fp8}: {FP8_WITH_HYBRIDEP}"


def find_missing_package(config: Any) -> Iterator[str]:
    """What is not installed on this machine of what a model with the setting needs."""
    back_end = config.moe_flex_dispatcher_backend
    if back_end not in list_installed():
        yield (
            f"{_FLAG}: --moe-flex-dispatcher-backend {back_end} needs the package "
            f"{_PACKAGES[back_end]}, which cannot be imported here; install it, {_LEAVE_OUT}"
        )


def list_installed() -> list[str]:
    """The back ends whose package Megatron has found, of those that LLEP can use."""
    from megatron.core.transformer.moe import fused_a2a

    found = {"deepep": fused_a2a.HAVE_DEEP_EP, "hybridep": fused_a2a.HAVE_HYBRIDEP}
    return [name for name in _PACKAGES if found[name]]
