"""Megatron's trace of the routing, which it has from 0.19 on."""

from megatron_llep.compat import MEGATRON

if MEGATRON >= (0, 19):
    from megatron.core.transformer.moe.router_trace import (
        RouterTracer,
        get_moe_router_tracer,
        init_moe_router_tracer,
    )

__all__ = ["RouterTracer", "get_moe_router_tracer", "init_moe_router_tracer"]
