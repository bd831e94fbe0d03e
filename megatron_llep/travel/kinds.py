"""Which token dispatcher `--moe-llep-dispatcher` asks for."""

from typing import Any

from megatron_llep.config import LLEPConfig
from megatron_llep.dispatcher import LLEPTokenDispatcher
from megatron_llep.travel.alltoall import AlltoallDispatcher
from megatron_llep.travel.flex import FlexDispatcher

KINDS: dict[str, type[LLEPTokenDispatcher]] = {
    "alltoall": AlltoallDispatcher,
    "flex": FlexDispatcher,
}


def make_dispatcher(*args: Any, llep: LLEPConfig, **more: Any) -> LLEPTokenDispatcher:
    """A layer's dispatcher; arguments as for `LLEPTokenDispatcher`."""
    return KINDS[llep.dispatcher](*args, llep=llep, **more)
