"""Names of methods and modes, and what each is."""

FORCED, PLAIN, AUTO = "forced", "plain", "auto"
EPLB, REPLICATED = "eplb", "eplb+replicas"
PLANNERS = ("tolerant", "exact", "lla", AUTO)

METHODS = {
    FORCED: "plain Megatron, the same tokens on every rank, routed evenly: not what the router "
    "says, but what perfect balance costs",
    PLAIN: "Megatron's own `MoELayer`, every expert at home",
    "tolerant": "LLEP, few experts lent: no rank has 5% more than the mean",
    "exact": "LLEP, all ranks the same",
    "lla": "LLEP, the paper's algorithm",
    AUTO: "LLEP, what a cost model predicts to be fastest",
    EPLB: "experts placed on ranks by the loads of the steps before, as many on each rank",
    REPLICATED: "as `eplb`, with a slot more on each rank, for a replica of a hot expert",
}

DISPATCH, LAYER, TRAIN = "dispatch", "layer", "train"
MODES = {
    DISPATCH: "tokens go to experts and come back, forward only; no router, no experts, no weights "
    "move: says what planning and dispatch cost, nothing of training",
    LAYER: "the layer, forward and backward, with router, experts, and lending: says what an MoE "
    "layer costs",
    TRAIN: "the same under Megatron's DistributedDataParallel, and a step of its optimizer (SGD "
    "with momentum): says what a training step of this layer costs",
}
