"""What else is refused: by LLEP's own settings, at conversion, or at the first forward."""

from megatron_llep.integration.settings.setting import Setting

_ROWS = (
    (
        "`--num-experts` left out, or no multiple of the expert-parallel size",
        "there is nothing to lend: set it, or leave `--moe-llep` out",
    ),
    (
        "`--moe-llep-max-foreign-experts` above the experts of a rank",
        "a rank may borrow at most as many as it hosts",
    ),
    (
        "`--moe-llep-replicas expert-dp` where expert data parallelism is 1",
        "no expert has a second replica: use more ranks or a smaller expert-parallel size, or "
        "leave the flag out",
    ),
    (
        "`--moe-llep-planner auto` without a cost model, or with one that cannot be read",
        "it predicts times: give `--moe-llep-cost-model` a file that `python -m megatron_llep "
        "calibrate` wrote, or choose another planner",
    ),
    (
        "`--moe-llep-planner lp` without `--moe-llep-replicas`",
        "it lends nothing: give `--moe-llep-replicas expert-dp`, or choose another planner",
    ),
    (
        "`--moe-llep-dispatcher flex` without `--moe-token-dispatcher-type flex`, or with "
        "`--moe-flex-dispatcher-backend ncclep`",
        "it is for DeepEP and HybridEP: give `--moe-flex-dispatcher-backend deepep` or `hybridep`, "
        "or leave it out and tokens go by all-to-all",
    ),
    (
        "`--moe-llep-dispatcher flex` where the back end's package (`deep_ep`) is not installed",
        "at start-up, on all ranks: install it, or leave it out",
    ),
    (
        "`--moe-llep-dispatcher flex` with `--overlap-moe-expert-parallel-comm`",
        "it has not been tried: leave one of them out",
    ),
    (
        "`--moe-llep-dispatcher flex` with HybridEP and `--moe-llep-replicas expert-dp`",
        "its one buffer is of the group that used it first, which may be that of plain layers: use "
        "`--moe-flex-dispatcher-backend deepep`, or leave one of them out",
    ),
    (
        "`--moe-llep-dispatcher flex` with HybridEP and experts in FP8",
        "HybridEP would pad the rows of experts, which LLEP counts by its plan: use "
        "`--moe-flex-dispatcher-backend deepep`, or leave it out",
    ),
    (
        "`--moe-llep-*` that differ between ranks",
        "give all ranks the same",
    ),
    (
        "`--moe-llep-expert-gemm grouped_mm` with experts other than `SequentialMLP` of "
        "Megatron's own linear layers",
        "it computes these alone: leave it out",
    ),
    (
        "`--moe-llep-expert-gemm grouped_mm` with weights whose sizes on a rank are no multiples "
        "of 16 bytes; on a GPU in other than bf16, or older than compute capability 8.0; with a "
        "torch that has no `grouped_mm`",
        "the kernel needs them: change the sizes or the dtype, or leave it out",
    ),
    (
        "experts of another kind than `SequentialMLP` and `TEGroupedMLP`",
        "LLEP cannot lend them: use one of these, or leave `--moe-llep` out",
    ),
    (
        "a `--te-precision-config-file` that chooses FP4 for experts, or a recipe that "
        "`--fp8-recipe` is refused for, or for those of `SequentialMLP` other than bf16",
        "at conversion, as for the flags: leave the experts out of its matchers, or choose "
        "tensorwise, blockwise or mxfp8",
    ),
    (
        "Kitchen (`--kitchen-config-file`, `--kitchen-recipe-number`)",
        "lent experts are not quantised by it: leave the flag out",
    ),
    (
        "a subclass of Megatron's `MoELayer`, in a model or a specification",
        "its own behaviour would be lost: use `MoELayer` itself, or leave `--moe-llep` out",
    ),
    (
        "adapters around experts that are not alike within a layer, on one rank or on several; "
        "buffers in experts",
        "at conversion, or at the first forward if they were put there later; a borrower would "
        "compute with something else: put the same around all experts of a layer",
    ),
    (
        "other adapters than LoRA (DoRA, say) around the linears of `TEGroupedMLP`, or with "
        "`--moe-llep-expert-gemm grouped_mm`; any with `--delay-wgrad-compute`",
        "likewise; only low-rank products are known to be added to what a linear computes: use "
        "LoRA, or leave the experts out of the target modules",
    ),
    (
        "`--gradient-accumulation-fusion` with an adapter that Megatron-Bridge shares between all "
        "experts (`share_expert_adapters`)",
        "likewise; the hook that sums its gradients over the ranks does not see fused ones, so the "
        "ranks' adapters drift apart, in plain Megatron too: leave the fusion off",
    ),
    (
        "experts whose weights FSDP shards, before or after LLEP was switched on",
        "it shards what LLEP lends, and is seen at conversion, else at the first forward: use "
        "Megatron's DDP with `--use-distributed-optimizer`",
    ),
)

REFUSED_ELSEWHERE = tuple(
    Setting(verdict="refused", title=title, text=text) for title, text in _ROWS
)
"""Where the table alone does not see it; who refuses names the reason in the same words."""
