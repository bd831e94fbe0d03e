"""The Megatron flags that a machine without a GPU needs, so that one command serves both."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CpuFlag:
    """One flag that is set where no GPU is; None as value for a flag that takes none."""

    flag: str
    value: str | None = None

    @property
    def words(self) -> list[str]:
        """The flag as it stands on a command line."""
        return [self.flag] if self.value is None else [self.flag, self.value]


@dataclass(frozen=True)
class GpuFlag:
    """One flag that cannot do what it says where no GPU is."""

    flag: str
    reason: str
    refused: tuple[str, ...] = ()
    """The values that cannot work; empty: all but those that work."""
    works: tuple[str, ...] = ()
    replaced_under: tuple[str, ...] = ()
    """With which `--moe-llep-dispatcher` LLEP runs something else, which needs no GPU."""

    def is_refused(self, values: Sequence[str]) -> bool:
        """Whether the flag cannot work with these values; a flag without values has none."""
        if self.refused:
            return any(value in self.refused for value in values)
        return not values or any(value not in self.works for value in values)


CPU_FLAGS = (
    CpuFlag("--distributed-backend", "gloo"),
    CpuFlag("--transformer-impl", "local"),
    CpuFlag("--no-gradient-accumulation-fusion"),
    CpuFlag("--no-masked-softmax-fusion"),
    CpuFlag("--no-persist-layer-norm"),
    CpuFlag("--no-rope-fusion"),
)

_TE = "it needs Transformer Engine and a GPU"
_GRAPHS = "CUDA graphs need a GPU"

GPU_FLAGS = (
    # Precision
    GpuFlag("--fp8-format", "FP8 kernels need a GPU"),
    GpuFlag("--fp4-format", "FP4 kernels need a GPU"),
    GpuFlag("--te-precision-config-file", _TE),
    GpuFlag("--use-precision-aware-optimizer", "it needs a fused optimizer and a GPU"),
    # Layers
    GpuFlag("--attention-backend", "its kernels need a GPU", refused=("flash", "fused")),
    GpuFlag("--use-flash-attn", "flash attention needs a GPU"),
    GpuFlag("--cross-entropy-fusion-impl", _TE, refused=("te",)),
    GpuFlag("--fused-residual-rmsnorm", _TE),
    GpuFlag("--use-te-activation-func", _TE),
    GpuFlag("--use-transformer-engine-op-fuser", _TE),
    GpuFlag("--te-rng-tracker", _TE),
    GpuFlag("--mla-down-proj-fusion", _TE),
    GpuFlag("--cache-mla-latents", "its kernels need a GPU"),
    GpuFlag("--recompute-modules", _TE, refused=("layernorm", "moe_act")),
    # Experts
    GpuFlag("--moe-grouped-gemm", "Megatron's grouped GEMM needs Transformer Engine and a GPU"),
    GpuFlag(
        "--moe-permute-fusion",
        "the fused permutation needs Transformer Engine and a GPU",
        replaced_under=("alltoall", "flex"),
    ),
    GpuFlag("--moe-router-fusion", "the fused router needs Transformer Engine and a GPU"),
    GpuFlag(
        "--moe-token-dispatcher-type",
        "its back ends need GPUs",
        refused=("flex",),
        replaced_under=("alltoall",),
    ),
    GpuFlag("--moe-enable-deepep", "DeepEP needs GPUs", replaced_under=("alltoall",)),
    GpuFlag(
        "--moe-permute-fusion-into-hybridep", "HybridEP needs GPUs", replaced_under=("alltoall",)
    ),
    # Communication
    GpuFlag(
        "--context-parallel-size",
        "context parallelism needs Transformer Engine's attention and a GPU",
        works=("1",),
    ),
    GpuFlag("--tp-comm-overlap", _TE),
    GpuFlag("--use-nccl-ub", "NCCL needs GPUs"),
    GpuFlag("--use-sharp", "NCCL needs GPUs"),
    GpuFlag("--symmetric-ar-type", "symmetric memory needs GPUs"),
    GpuFlag("--pipeline-model-parallel-comm-backend", "only gloo connects the stages"),
    GpuFlag("--use-ring-exchange-p2p", "only gloo connects the stages"),
    GpuFlag(
        "--no-overlap-p2p-communication",
        "over gloo, virtual pipeline stages get wrong data from batched sends and receives",
    ),
    # CUDA graphs, offloading, profiling
    GpuFlag("--cuda-graph-impl", _GRAPHS, works=("none",)),
    GpuFlag("--enable-cuda-graph", _GRAPHS),
    GpuFlag("--external-cuda-graph", _GRAPHS),
    GpuFlag("--optimizer-cuda-graph", _GRAPHS),
    GpuFlag("--cpu-offloading-num-layers", "there is no GPU memory to spare", works=("0",)),
    GpuFlag("--fine-grained-activation-offloading", "there is no GPU memory to spare"),
    GpuFlag("--optimizer-cpu-offload", "there is no GPU memory to spare"),
    GpuFlag("--record-memory-history", "PyTorch records the history of GPU memory"),
    GpuFlag("--nvtx-ranges", "NVIDIA's profiler needs a GPU"),
    GpuFlag("--gpu-sniff-test-interval", "it tests GPUs"),
)


def flags_without_gpu(argv: Sequence[str]) -> list[str]:
    """The flags to add to a command line where no GPU is.

    Args:
        argv: the user's flags, without the program's name.

    Returns:
        Flags that the user has not given already.

    Raises:
        ValueError: flags of the user contradict some of them, or need a GPU; names them all.
    """
    given = _read_flags(argv)
    dispatcher = _find_dispatcher(given)
    refusals = []
    for gpu_flag in GPU_FLAGS:
        values = given.get(gpu_flag.flag)
        if values is None or not gpu_flag.is_refused(values):
            continue
        if dispatcher in gpu_flag.replaced_under:
            continue
        what = " ".join([gpu_flag.flag, *values])
        refusals.append(f"{what}: {gpu_flag.reason}; leave the flag out where there is none")
    added = []
    for cpu_flag in CPU_FLAGS:
        values = given.get(cpu_flag.flag)
        if values is None:
            added += cpu_flag.words
        elif [cpu_flag.flag, *values] != cpu_flag.words:
            refusals.append(
                f"{' '.join([cpu_flag.flag, *values])}: without a GPU only "
                f"{' '.join(cpu_flag.words)} works; leave the flag out"
            )
    if refusals:
        raise ValueError("\n".join(refusals))
    return added


def _find_dispatcher(given: dict[str, list[str]]) -> str | None:
    """LLEP's, where experts are lent and its replacements run; else None."""
    if "--moe-llep" not in given or given.get("--expert-model-parallel-size", ["1"]) == ["1"]:
        return None
    return " ".join(given.get("--moe-llep-dispatcher", ["alltoall"]))


def _read_flags(argv: Sequence[str]) -> dict[str, list[str]]:
    """Each flag with its values; the last one of a name wins, as in argparse."""
    given: dict[str, list[str]] = {}
    values: list[str] = []  # those before the first flag belong to none
    for word in argv:
        if word.startswith("--"):
            flag, is_joined, value = word.partition("=")
            values = given[flag] = [value] if is_joined else []
        else:
            values.append(word)
    return given
