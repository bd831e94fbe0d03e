"""What is neither tested with LLEP nor refused."""

from megatron_llep.integration.settings.setting import Setting

_ROWS = (
    (
        "`--optimizer soap`, `adaptive_muon`",
        "they get the gradients that Muon gets; under SOAP rounding alone sets two runs of plain "
        "Megatron apart; emerging-optimizers 0.3.0 has no adaptive Muon that fits Megatron 0.19",
    ),
    (
        "`--optimizer-cuda-graph`",
        "needs a GPU; its graph holds the optimizer's step alone, which begins when gradients of "
        "lent experts are home",
    ),
    (
        "`--use-nccl-ub`, `--use-sharp`",
        "need NCCL; gradients of lent experts are added to buffers that NCCL has registered",
    ),
    (
        "`--fp32-residual-connection`, `--moe-router-fusion`, `--use-te-activation-func`, "
        "`--tp-comm-overlap`",
        "need Transformer Engine on a GPU",
    ),
    (
        "`--tensor-parallel-num-weight-shards`",
        "needs Transformer Engine; it shards dense weights, and those of experts only with the "
        "flag that is refused",
    ),
    (
        "`--moe-use-upcycling`",
        "needs a dense checkpoint to start from",
    ),
    (
        "`--inprocess-restart`",
        "needs NVIDIA's resiliency extension",
    ),
)

UNTRIED = tuple(Setting(verdict="untried", title=title, text=text) for title, text in _ROWS)
"""Why, and what is known."""
