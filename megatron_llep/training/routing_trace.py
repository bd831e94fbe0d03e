"""Megatron's trace of the routing, with layers as the whole model numbers them.

Megatron 0.19 names a decoder layer by its place in the model chunk, which other stages of a
pipeline, and other chunks of a stage, have too.
"""

from argparse import Namespace
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model

from megatron_llep.compat.routing_trace import (
    RouterTracer,
    get_moe_router_tracer,
    init_moe_router_tracer,
)

Chunks = list[torch.nn.Module]


class WholeModelTracer(RouterTracer):
    """Megatron's, which numbers decoder layers over all stages."""

    def register_hooks(self, model: torch.nn.Module | Chunks) -> None:
        """As Megatron's; layers of multi-token prediction keep their names."""
        for chunk in model if isinstance(model, (list, tuple)) else [model]:
            for name, router in unwrap_model(chunk).named_modules():
                if not isinstance(router, TopKRouter):
                    continue
                if name.startswith("decoder.") and router.layer_number is not None:
                    name = f"decoder.layers.{router.layer_number - 1}.mlp.router"
                self._hook_handles.append(router.register_forward_hook(self.make_hook(name)))


def trace_hook(args: Namespace) -> Callable[[Chunks], Chunks]:
    """A hook for `pre_wrap_hooks` that has the tracer in place before Megatron makes its own."""

    def prepare(chunks: Chunks) -> Chunks:
        init_moe_router_tracer(
            output_dir=args.moe_routing_trace_path,
            max_steps=args.moe_routing_trace_max_training_iters or args.train_iters,
            rank=dist.get_rank(),
            training_mode=True,
            capture_hidden_states=args.moe_routing_trace_capture_hidden_states,
            capture_logits=args.moe_routing_trace_capture_logits,
            dump_router_weights=args.moe_routing_trace_dump_weights,
        )
        tracer = get_moe_router_tracer()
        tracer.__class__ = WholeModelTracer
        return chunks

    return prepare
