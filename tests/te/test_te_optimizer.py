"""Main gradients in bf16, as Transformer Engine's FusedAdam takes them.

Its kernel is a stand-in here.
"""

from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("transformer_engine.pytorch")

from support.layout import Layout
from support.parity import Case, compare_all
from support.routing import Routing
from support.training import Run

pytestmark = pytest.mark.te

BF16 = {"bf16": True, "params_dtype": torch.bfloat16}
# A large epsilon keeps the gradient's scale.
ADAM = {
    **BF16,
    "optimizer": "adam",
    "adam_eps": 1.0,
    "lr": 0.01,
    "use_precision_aware_optimizer": True,
    "store_param_remainders": False,
}


def update_by_adam(
    chunk_size: int,
    overflowed: torch.Tensor,
    lists: Sequence[Sequence[torch.Tensor]],
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    corrected: int,
    decay: float,
) -> None:
    """STAND-IN for `multi_tensor_adam`: gradients, parameters, two moments and, of parameters in 16
    bits, those in fp32."""
    assert decoupled
    assert corrected
    for grad, parameter, average, square, *mains in zip(*lists, strict=True):
        (main,) = mains or [parameter]
        grad = grad.float()
        average.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = (square / (1 - beta2**step)).sqrt() + eps
        main.sub_(rate * (average / (1 - beta1**step) / scale + decay * main))
        parameter.copy_(main)


@pytest.fixture(autouse=True)
def use_fused_adam(monkeypatch, gemms):
    import transformer_engine_torch as tex
    from megatron.core import optimizer
    from transformer_engine.pytorch.optimizers import FusedAdam

    monkeypatch.setattr(tex, "multi_tensor_adam", update_by_adam)
    monkeypatch.setattr(optimizer, "Adam", FusedAdam)
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)


def make_case(**optimizer) -> Case:
    in_fp32 = optimizer.get("main_grads_dtype", torch.float32) == torch.float32
    run = Run(
        layout=Layout(ep=2, dp=4),
        routing=Routing("hot"),
        micro_batches=8,
        config={**BF16, "pipeline_dtype": torch.bfloat16},
        optimizer=ADAM | optimizer,
        ddp={
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "bucket_size": 5000,
            "grad_reduce_in_fp32": in_fp32,
        },
    )
    return Case(run, loss_tolerance=5e-3, gradient_tolerance=2e-2)


def test_precision_aware_optimizer():
    compare_all(
        {
            "gradients in fp32": make_case(),
            "gradients in bf16": make_case(main_grads_dtype=torch.bfloat16),
            "all in 16 bits": make_case(
                main_grads_dtype=torch.bfloat16,
                main_params_dtype=torch.float16,
                exp_avg_dtype=torch.float16,
                exp_avg_sq_dtype=torch.float16,
            ),
        },
        timeout=120,
    )
