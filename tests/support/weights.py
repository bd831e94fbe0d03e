"""The same initial weights in every layout, and how a rank's share is cut from the whole.

A parameter's global name says which layer and which expert of the whole model it belongs to.
Its values come from a generator seeded with that name.
"""

import re
import zlib
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer

from support.layout import Layout

_EXPERT = re.compile(r"experts\.local_experts\.(\d+)\.")
# Grouped experts: one linear with numbered weights.
_GROUPED_EXPERT = re.compile(r"experts\.(linear_fc[12]\.)(weight|bias)(\d+)$")


@dataclass(frozen=True)
class Shard:
    """Which part of the whole tensor a rank holds: piece ``index`` of ``count`` along ``dim``.

    With ``stride`` 2 the whole is two tensors one after the other (gate and up projection), each
    of which is cut.
    """

    dim: int = 0
    index: int = 0
    count: int = 1
    stride: int = 1

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """The rank's part of ``whole``."""
        parts = whole.chunk(self.stride, self.dim)
        return torch.cat([part.chunk(self.count, self.dim)[self.index] for part in parts], self.dim)


@dataclass(frozen=True)
class NamedParameter:
    """A parameter of this rank, its name in the whole model, and its part of the whole."""

    name: str
    parameter: torch.nn.Parameter
    shard: Shard


def list_parameters(chunks: list[torch.nn.Module], layout: Layout) -> list[NamedParameter]:
    """All parameters of this rank's model chunks (not wrapped in DDP), in model order."""
    named = []
    for chunk in chunks:
        layers = {
            f"{name}.": module.layer_number - 1
            for name, module in chunk.named_modules()
            if isinstance(module, TransformerLayer) and name.startswith("decoder.")
        }
        gated = chunk.config.gated_linear_unit
        for name, parameter in chunk.named_parameters():
            shard = _get_shard(name, parameter, layout, gated)
            named.append(NamedParameter(_get_global_name(name, layers, chunk), parameter, shard))
    return named


def fill_parameters(parameters: list[NamedParameter]) -> None:
    """Set every parameter from its global name, whatever the layout."""
    for each in parameters:
        shape = list(each.parameter.shape)
        shape[each.shard.dim] *= each.shard.count
        generator = torch.Generator().manual_seed(zlib.crc32(each.name.encode()))
        whole = torch.randn(shape, generator=generator) * 0.15
        if each.name.endswith("norm.weight"):
            whole += 1
        if "router" in each.name:
            whole *= 3
        with torch.no_grad():
            each.parameter.copy_(each.shard.cut(whole))


def _get_global_name(name: str, layers: dict[str, int], chunk: torch.nn.Module) -> str:
    for prefix, number in layers.items():
        if name.startswith(prefix):
            name = f"decoder.layers.{number}.{name.removeprefix(prefix)}"
            break
    name = _GROUPED_EXPERT.sub(r"experts.local_experts.\3.\1\2", name)
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    match = _EXPERT.search(name)
    if match:
        ep = parallel_state.get_expert_model_parallel_world_size()
        native = chunk.config.num_moe_experts // ep
        first = parallel_state.get_expert_model_parallel_rank() * native
        expert = first + int(match[1])
        name = f"{name[: match.start()]}experts.{expert}.{name[match.end() :]}"
    return name


def _get_shard(name: str, parameter: torch.nn.Parameter, layout: Layout, gated: bool) -> Shard:
    if not getattr(parameter, "tensor_model_parallel", False):
        return Shard()
    if _EXPERT.search(name) or _GROUPED_EXPERT.search(name):
        index, count = parallel_state.get_expert_tensor_parallel_rank(), layout.expert_tp
    else:
        index, count = parallel_state.get_tensor_model_parallel_rank(), layout.tp
    stride = 2 if gated and "linear_fc1" in name else 1
    return Shard(parameter.partition_dim, index, count, stride)
