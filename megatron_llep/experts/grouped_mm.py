"""Experts in grouped GEMMs by torch alone: for machines without Transformer Engine.

Letters: N tokens on this rank after dispatch, sorted by slot, H hidden size, M native slots,
F foreign experts (F <= S foreign slots; the other slots get no token).

A built `SequentialMLP` becomes a `GroupedMM` in place: its parameters, and with them its
checkpoints, initialisation, optimizer and data parallelism, stay as they are.

Natives are one grouped GEMM per linear and direction, foreign experts another, on ranks that have
some, so that natives are computed while foreign weights travel, and while gradients return. One for
both would have to wait for them, and would need all weights at equal distances in one storage:
either room for S foreign experts in every layer all the time, as much memory as the natives for
S = M, or a copy of M experts per GEMM. Neither is worth one launch.

The natives' weights are laid out at equal distances when the module is converted, and multiplied
where they lie. Megatron's distributed optimizer moves parameters into a buffer of its own, last one
first, and saves its state in that order, so the order cannot be changed; a stride cannot be
negative either. There the M weights of one linear are copied together for each GEMM that reads
them (forward and input gradient), which takes their memory once more for that time.

Adapters (LoRA) around the linears are not grouped: see `experts.expert_linears`.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.nn import functional

from megatron_llep.compat import weight_shards
from megatron_llep.experts.adapters import check_gradients_add_up
from megatron_llep.experts.base import LendableExperts, find_gather_hooks
from megatron_llep.experts.expert_linears import Around, ExpertLinears
from megatron_llep.experts.grouped_linear import ROW_BYTES, Groups, grouped_linear, spread_biases
from megatron_llep.experts.sequential import describe_alike
from megatron_llep.lending.parcel import Weights

FLAG = "--moe-llep-expert-gemm grouped_mm"
_INSTEAD = "or use --moe-llep-expert-gemm megatron"
_FIRST_CAPABILITY = (8, 0)


class GroupedMM(SequentialMLP):
    """Megatron's `SequentialMLP`, computed in grouped GEMMs."""

    @classmethod
    def convert(cls, module: torch.nn.Module) -> None:
        """Turn a built `SequentialMLP` into this class, in place: same parameters, same module.

        The weights of each linear move into one tensor.

        Raises:
            ValueError: the module is another, or its weights do not suit the kernel.
        """
        check_convertible(module)
        module.__class__ = cls
        module.find_linears()
        for linears in zip(*module.linears.bases, strict=True):
            _lay_out([linear.weight for linear in linears])

    def find_linears(self) -> None:
        """Look for the experts' linears, and for adapters around them."""
        self.linears = ExpertLinears(self.local_experts)

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """Run the M native experts on their tokens: [N, H] -> [N, H]."""
        output = run_experts(
            self.local_experts[0],
            [_use_weights(*bases) for bases in self.linears.bases],
            permuted_local_hidden_states,
            tokens_per_expert.tolist(),
            permuted_probs,
            around=self.linears.around_natives(),
        )
        return output, None


class LendableGroupedMM(LendableExperts):
    """One grouped GEMM per linear and direction over the natives, and one over foreign experts."""

    module_type = GroupedMM

    def __init__(self, module: GroupedMM):
        """See the class.

        Raises:
            ValueError: the linears are not Megatron's, or adapters around them are not known.
        """
        super().__init__(module)
        module.find_linears()
        self._linears = module.linears
        check_linears(self._linears)
        self._per_expert = len(_get_weights(*self._linears.bases[0]))

    def describe(self) -> list[str]:
        """See the base class."""
        check_gradients_add_up(self.module)
        return describe_alike(self.module.local_experts)

    def weights(self) -> list[Weights]:
        """M tuples of parameters: of the linears, then of adapters, if there are any."""
        return [
            _get_weights(*bases) + self._linears.adapter_weights(expert)
            for expert, bases in enumerate(self._linears.bases)
        ]

    def compute_foreign(
        self,
        hidden: torch.Tensor,
        probs: torch.Tensor,
        tokens: Sequence[int],
        foreign: Sequence[Weights],
    ) -> torch.Tensor:
        """Run F foreign experts on their tokens: [n, H] -> [n, H]."""
        return run_experts(
            self.module.local_experts[0],
            [each[: self._per_expert] for each in foreign],
            hidden,
            tokens,
            probs,
            around=self._linears.around_foreign([each[self._per_expert :] for each in foreign]),
        )


def run_experts(
    like: MLP,
    experts: Sequence[Weights],
    hidden: torch.Tensor,
    tokens_per_expert: Sequence[int],
    probs: torch.Tensor,
    around: Sequence[Around | None] = (None, None),
) -> torch.Tensor:
    """Run experts on their tokens, as Megatron's `SequentialMLP` does.

    Args:
        like: one of Megatron's experts, for its configuration and activation function.
        experts: each expert's weights: of the first linear, then of the second, a weight and, if
            the experts have biases, a bias.
        hidden: [n, H], sorted by expert.
        tokens_per_expert: on the host.
        probs: [n], the router's weight of each row.
        around: the adapters of the first and of the second linear.

    Returns:
        [n, H], each row weighted by its probability.
    """
    groups = Groups.of(tokens_per_expert, hidden.device)
    if like.config.moe_apply_probs_on_input:
        hidden = (probs.unsqueeze(-1) * hidden).to(hidden.dtype)
        probs = torch.ones_like(probs)
    tensors = tuple(zip(*experts, strict=True))
    fc1, fc2 = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
    expert = SimpleNamespace(
        config=like.config,
        activation_func=like.activation_func,
        linear_fc1=_Linear(groups, *fc1, around=around[0]),
        # MLP would take a bias of this one for the same in all rows, so it is added below.
        linear_fc2=_Linear(groups, fc2[0], around=around[1]),
    )
    output, _ = MLP.forward(expert, hidden, probs)
    for biases in fc2[1:]:
        output += spread_biases(biases, groups) * probs.unsqueeze(-1)
    return output


def check_convertible(module: torch.nn.Module) -> None:
    """Check that a module's experts can run as a `GroupedMM`.

    Raises:
        ValueError: names the flag, what does not fit and the way out.
    """
    if not hasattr(functional, "grouped_mm"):
        raise ValueError(
            f"{FLAG}: torch {torch.__version__} has no torch.nn.functional.grouped_mm; "
            f"install a newer torch, {_INSTEAD}"
        )
    if type(module) is not SequentialMLP:
        raise ValueError(
            f"{FLAG}: computes the experts of Megatron's SequentialMLP, not of "
            f"{type(module).__name__}; leave --moe-grouped-gemm out, {_INSTEAD}"
        )
    check_linears(ExpertLinears(module.local_experts))


def check_linears(linears: ExpertLinears) -> None:
    """Check that a `GroupedMM` can compute these linears, and the adapters around them.

    Raises:
        ValueError: names the flag, what does not fit and the way out.
    """
    linears.check_known()
    for fc1, fc2 in linears.bases:
        for linear, kind in ((fc1, ColumnParallelLinear), (fc2, RowParallelLinear)):
            if type(linear) is not kind or weight_shards(linear) > 1:
                raise ValueError(
                    f"{FLAG}: computes experts of Megatron's own linear layers, not of "
                    f"{type(linear).__name__}; use --transformer-impl local, {_INSTEAD}"
                )
            weight = linear.weight
            capability = torch.cuda.get_device_capability(weight.device) if weight.is_cuda else None
            check_kernel(weight.dtype, tuple(weight.shape), capability)


def check_kernel(
    dtype: torch.dtype, shape: tuple[int, ...], capability: tuple[int, int] | None
) -> None:
    """Check that the kernel takes weights like this.

    Args:
        dtype: of a weight.
        shape: [out, in] of a weight on this rank.
        capability: of the GPU; None on a CPU.

    Raises:
        ValueError: names the flag, what does not fit and the way out.
    """
    if capability is not None and dtype != torch.bfloat16:
        raise ValueError(
            f"{FLAG}: computes in bf16 on a GPU, not in {dtype}; add --bf16, {_INSTEAD}"
        )
    if capability is not None and capability < _FIRST_CAPABILITY:
        raise ValueError(
            f"{FLAG}: needs a GPU of compute capability {_FIRST_CAPABILITY} or more, this one has "
            f"{capability}; {_INSTEAD.removeprefix('or ')}"
        )
    multiple = ROW_BYTES // dtype.itemsize
    if any(size % multiple for size in shape):
        raise ValueError(
            f"{FLAG}: an expert's weight is {list(shape)} on this rank, and both sizes must be "
            f"multiples of {multiple}; change --hidden-size (or --moe-latent-size), "
            f"--moe-ffn-hidden-size or --expert-tensor-parallel-size, {_INSTEAD}"
        )


class _Linear(torch.nn.Module):
    """Stands for one expert's linear in Megatron's `MLP`, and computes those of all."""

    def __init__(
        self,
        groups: Groups,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor] | None = None,
        *,
        around: Around | None = None,
    ):
        super().__init__()
        self._weights, self._biases, self._groups = weights, biases, groups
        self._around = around

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[n, in] -> [n, out] and the rows' biases [n, out], as Megatron's linears do."""
        biases = None if self._biases is None else spread_biases(self._biases, self._groups)
        output = grouped_linear(hidden, self._weights, self._groups)
        if self._around is not None:
            sizes = list(self._groups.sizes)
            rows = zip(self._around, hidden.split(sizes), output.split(sizes), strict=True)
            output = torch.cat([adapt(*of_expert) for adapt, *of_expert in rows])
        return output, biases


def _use_weights(fc1: torch.nn.Module, fc2: torch.nn.Module) -> Weights:
    """An expert's weights, to be read now.

    The linears, which are not called, have hooks by which `--overlap-param-gather` waits for
    their parameters.
    """
    for linear in (fc1, fc2):
        for hook in find_gather_hooks(linear):
            hook(linear, ())
    return _get_weights(fc1, fc2)


def _get_weights(fc1: torch.nn.Module, fc2: torch.nn.Module) -> Weights:
    """In the order of the expert's parameters. By name: iterating over modules is slow."""
    weights = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    return tuple(weight for weight in weights if weight is not None)


def _lay_out(weights: Sequence[torch.nn.Parameter]) -> None:
    """Move M weights [...] into one tensor [M, ...]."""
    slab = weights[0].new_empty((len(weights), *weights[0].shape), requires_grad=False)
    with torch.no_grad():
        for weight, place in zip(weights, slab, strict=True):
            weight.data = place.copy_(weight)
