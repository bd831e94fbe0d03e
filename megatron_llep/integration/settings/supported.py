"""What works with LLEP as in plain Megatron; the tests compare the two."""

from megatron_llep.integration.settings.setting import Setting

_ROWS = (
    (
        "`--expert-model-parallel-size` 2 or more",
        "experts are lent within this group",
    ),
    (
        "`--tensor-model-parallel-size`, with `--sequence-parallel`",
        "",
    ),
    (
        "`--expert-tensor-parallel-size`",
        "each rank lends its part of an expert",
    ),
    (
        "`--pipeline-model-parallel-size`",
        "foreign weights are fetched again in backward by default",
    ),
    (
        "`--num-layers-per-virtual-pipeline-stage`",
        "",
    ),
    (
        "expert data parallelism",
        "each replica of the expert-parallel group plans for itself",
    ),
    (
        "`--moe-llep-replicas expert-dp`",
        "all replicas plan as one: tokens may go to any replica of their expert, and lending "
        "reaches all these ranks. The ranks that share tokens must run the same number of "
        "forwards, as Megatron's training and evaluation do",
    ),
    (
        "`--moe-llep-dispatcher flex` with `--moe-token-dispatcher-type flex` and "
        "`--moe-flex-dispatcher-backend deepep` or `hybridep`",
        "tokens travel through the back end; tested with Megatron's classes over a stand-in for "
        "the back ends' buffers on a CPU, not yet run on GPUs",
    ),
    (
        "`--overlap-grad-reduce`",
        "returned gradients are added before the reduction starts",
    ),
    (
        "`--use-distributed-optimizer`",
        "",
    ),
    (
        "`--overlap-param-gather`",
        "a lender waits for its parameters before it lends them",
    ),
    (
        "`--num-distributed-optimizer-instances`",
        "with replicas too",
    ),
    (
        "`--no-align-param-gather`, `--disable-align-grad-reduce`",
        "and their defaults: schedules start gathers and reductions then",
    ),
    (
        "`--ddp-bucket-size`, `--ddp-num-buckets`, `--ddp-pad-buckets-for-high-nccl-busbw`, "
        "`--ddp-average-in-collective`",
        "",
    ),
    (
        "`--context-parallel-size`",
        "ranks that share sequences are ranks like any others; tested on a CPU with an attention "
        "of the tests, as Megatron's needs Transformer Engine",
    ),
    (
        "`--microbatch-group-size-per-virtual-pipeline-stage`, `--use-tp-pp-dp-mapping`",
        "",
    ),
    (
        "several micro-batches, `--clip-grad`, `--calculate-per-token-loss`",
        "",
    ),
    (
        "`--decoupled-lr`, `--log-num-zeros-in-grad`, `--check-for-large-grads`, the check for NaN",
        "gradients are seen when those of lent experts are home",
    ),
    (
        "`--bf16`",
        "gradients of lent experts return in fp32 by default",
    ),
    (
        "`--fp16`",
        "with a fixed and a moving loss scale; steps are skipped where plain Megatron skips them",
    ),
    (
        "`--grad-reduce-in-bf16`, `--ddp-reduce-scatter-with-fp32-accumulation`, "
        "`--ddp-param-name-patterns-for-fp32-local-accumulation`",
        "gradients of lent experts add up in fp32 until they are home",
    ),
    (
        "`--use-precision-aware-optimizer`, `--main-grads-dtype`, `--main-params-dtype`, "
        "`--exp-avg-dtype`, `--exp-avg-sq-dtype`",
        "tested with Transformer Engine's Python code over a stand-in for its kernel on a CPU, "
        "not on a GPU",
    ),
    (
        "`--optimizer-cpu-offload`, `--optimizer-offload-fraction`, "
        "`--overlap-cpu-optimizer-d2h-h2d`",
        "gradients are copied to the host in the step, when those of lent experts are home, and "
        "parameters back before the next forward lends them; tested on a CPU with a stand-in for "
        "what tells GPU from host, not on a GPU",
    ),
    (
        "`--optimizer muon`, with `--use-distributed-optimizer` too, `--optimizer lion`",
        "tested with emerging-optimizers 0.3.0, which has to be installed",
    ),
    (
        "`--recompute-granularity full`, uniform and block",
        "the recomputed forward plans again",
    ),
    (
        "`--recompute-modules moe`, `core_attn`",
        "routing may differ the second time",
    ),
    (
        "`--recompute-modules shared_experts`, `mlp`",
        "each alone and with `moe`",
    ),
    (
        "`--recompute-modules layernorm`",
        "alone, with `moe` and `moe_act`; needs Transformer Engine",
    ),
    (
        "`--mlp-chunks-for-training`",
        "every chunk is planned, and lends, for itself",
    ),
    (
        "shared experts, `--moe-shared-expert-overlap`",
        "",
    ),
    (
        "`--moe-grouped-gemm` with Transformer Engine",
        "natives have a grouped GEMM per linear and direction, foreign experts another; tested "
        "with Transformer Engine's Python code over a stand-in for its GEMM on a CPU, not on a "
        "GPU",
    ),
    (
        "`--overlap-moe-expert-parallel-comm`, `--ep-overlap-early-attn-memory-release`",
        "one stage, or virtual stages, as Megatron has it; returned gradients are waited for at "
        "the end of the experts' own backward, so less hides the return; shared experts are "
        "computed before the counts travel; not tried with streams on a GPU",
    ),
    (
        "`--delay-wgrad-compute`",
        "foreign experts' weight gradients are not delayed; the return is waited for after the "
        "natives' delayed ones, and before they are reduced; tested with Transformer Engine's "
        "Python code over a stand-in for its GEMM on a CPU, not on a GPU",
    ),
    (
        "`--fp8-param-gather` with tensorwise, blockwise or mxfp8 scaling, "
        "`--reuse-grad-buf-for-mxfp8-param-ag`",
        "FP8 data and scales are lent as they are; tested on a CPU with Transformer Engine's "
        "tensors and stand-ins for its kernels, no FP8 kernel has run, see `docs/gpu.md`",
    ),
    (
        "`--cuda-graph-impl transformer_engine` with `--cuda-graph-modules attn`, `mlp`, "
        "`mamba`, `moe_router`",
        "`moe_preprocess` is taken out of the list, and with it `moe_router` if "
        "`--recompute-modules layernorm` is on; where nothing else is in it, nothing is captured, "
        "and the configuration says `--cuda-graph-impl none`; tested with a stand-in for the graph "
        "on a CPU, not on a GPU",
    ),
    (
        "`--cuda-graph-impl local` with `--cuda-graph-modules attn`, `mlp`, `mamba`",
        "where these are layers of their own, as in hybrid models; a layer with attention and "
        "experts would be captured whole and is refused; not run on a GPU",
    ),
    (
        "`--fine-grained-activation-offloading`",
        "with `expert_fc1` and `moe_act` what natives save is offloaded; what foreign experts "
        "save stays on the GPU; tested with a stand-in for the copies on a CPU, not on a GPU",
    ),
    (
        "`--cpu-offloading-num-layers N --moe-grouped-gemm`",
        "what natives and foreign experts save is offloaded; lent weights stay on the GPU; tested "
        "with Transformer Engine 2.20's Python code on a CPU, not on a GPU",
    ),
    (
        "`--gradient-accumulation-fusion`",
        "the GEMM adds foreign weight gradients to the buffers in which they go home",
    ),
    (
        "FP8 with `--moe-grouped-gemm` and tensorwise, blockwise or mxfp8 scaling, "
        "`--first-last-layers-bf16`",
        "without `--fp8-param-gather` foreign experts travel in bf16 and are quantised where "
        "they arrive; no FP8 kernel has run, see `docs/gpu.md`",
    ),
    (
        "`--te-precision-config-file`",
        "for modules other than experts; for experts it may choose bf16, and of recipes those that "
        "`--fp8-recipe` may be; no FP8 kernel has run",
    ),
    (
        "`--recompute-modules moe_act`",
        "needs Transformer Engine's experts",
    ),
    (
        "biases, clamped activations, shared or tied embeddings",
        "",
    ),
    (
        "softmax and sigmoid routers, expert bias, groups, auxiliary losses",
        "routing is untouched",
    ),
    (
        "`--moe-router-score-function sqrtsoftplus`, `--moe-router-load-balancing-type` sinkhorn "
        "and quantile_balancing, `--moe-router-pre-softmax`, `--moe-router-topk-scaling-factor`, "
        "`--moe-router-dtype`, `--moe-z-loss-coeff`, `--moe-input-jitter-eps`",
        "routing is untouched",
    ),
    (
        "`--moe-expert-capacity-factor`, `--moe-token-drop-policy`",
        "Megatron's router drops tokens as ever, by its own rank's counts; what is left is lent",
    ),
    (
        "`--moe-router-force-load-balancing`, `--moe-router-force-biased`",
        "loads are as forced, and lent accordingly",
    ),
    (
        "`--hidden-dropout`, `--attention-dropout`, `--moe-shared-expert-gate`, "
        "`--moe-apply-probs-on-input`, `--cross-entropy-loss-fusion`, `--use-mup`, "
        "`--deterministic-mode`, `--use-cpu-initialization`",
        "",
    ),
    (
        "fused SwiGLU, squared ReLU, `--glu-linear-offset`",
        "foreign experts are computed as natives are",
    ),
    (
        "`--multi-latent-attention`",
        "it holds nothing of LLEP; without Transformer Engine Megatron's own runs in local layers, "
        "where tensor parallelism must divide `--q-lora-rank` and `--kv-lora-rank` plus "
        "`--qk-pos-emb-head-dim`",
    ),
    (
        "`--moe-latent-size`",
        "tokens are sent and computed in the latent size, and lent experts are as small, in "
        "metrics and cost model too; without Transformer Engine this project's linear layer "
        "projects",
    ),
    (
        "`--moe-enable-routing-replay`",
        "the replayed routing is obeyed, also where a token names an expert twice; later layers' "
        "counts are exchanged at once, and experts lent a layer ahead (`--moe-llep-plan-ahead`)",
    ),
    (
        "`--mtp-num-layers`",
        "through the model hook; a layer specification does not reach them, but that of a hybrid "
        "stack",
    ),
    (
        "`--mtp-use-repeated-layer`, `--mtp-detach-heads`",
        "each use of a layer is planned for itself",
    ),
    (
        "hybrid models (`--hybrid-layer-pattern`)",
        "in `pretrain/pretrain_hybrid.py`, through `convert_model`, and through `with_llep` of a "
        "stack; tested with layers of attention, dense ones, experts and multi-token prediction, "
        "in pipeline and virtual stages, some without experts; the kernels of `M` (mamba-ssm) and "
        "`G` (flash-linear-attention) need a GPU, and these layers hold nothing of LLEP",
    ),
    (
        "frozen experts, routers, layers",
        "on some ranks or all; nothing returns if no rank trains its experts",
    ),
    (
        "evaluation, `no_grad`, token counts that differ between ranks",
        "",
    ),
    (
        "`--moe-llep-expert-gemm grouped_mm`",
        "with all of the above; checkpoints stay those of `SequentialMLP`",
    ),
    (
        "LoRA on experts, put in before or after LLEP: adapters as Megatron-Bridge's (shared by a "
        "rank's experts or not, canonical) or ms-swift's",
        "adapters travel with their expert, and only what trains sends gradients home; those that "
        "Bridge keeps equal on all ranks stay at home. With dropout in adapters the rows of lent "
        "experts draw other random numbers, of the same distribution",
    ),
    (
        "`torch_dist` checkpoints",
        "those of plain Megatron, in any other layout",
    ),
)

SUPPORTED = tuple(Setting(verdict="supported", title=title, text=text) for title, text in _ROWS)
"""In the order of the documentation."""
