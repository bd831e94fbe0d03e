"""The Megatron flags that a machine without a GPU needs, so that one command serves both."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CpuFlag:
    """One flag that is set where no GPU is, and what a user must not set instead."""

    flag: str
    value: str | None = None
    contrary: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """The flag as it stands on a command line."""
        return [self.flag] if self.value is None else [self.flag, self.value]


CPU_FLAGS = (
    CpuFlag("--distributed-backend", "gloo"),
    CpuFlag("--transformer-impl", "local"),
    CpuFlag("--no-gradient-accumulation-fusion"),
    CpuFlag("--no-masked-softmax-fusion"),
    CpuFlag("--no-persist-layer-norm"),
    CpuFlag("--no-rope-fusion", contrary=("--apply-rope-fusion",)),
)

GPU_ONLY_FLAGS = {
    "--fp8-format": "FP8 kernels need a GPU",
    "--fp4-format": "FP4 kernels need a GPU",
    "--use-flash-attn": "flash attention needs a GPU",
    "--moe-grouped-gemm": "Megatron's grouped GEMM needs Transformer Engine and a GPU",
    "--moe-permute-fusion": "the fused permutation needs Transformer Engine and a GPU",
    "--moe-router-fusion": "the fused router needs Transformer Engine and a GPU",
    "--moe-enable-deepep": "DeepEP needs GPUs",
    "--tp-comm-overlap": "it needs Transformer Engine and a GPU",
    "--enable-cuda-graph": "CUDA graphs need a GPU",
    "--use-nccl-ub": "NCCL needs GPUs",
    "--no-overlap-p2p-communication": "gloo has no batched exchange between pipeline stages",
}


def flags_without_gpu(argv: Sequence[str]) -> list[str]:
    """The flags to add to a command line where no GPU is.

    Args:
        argv: the user's flags, without the program's name.

    Returns:
        Flags that the user has not given already.

    Raises:
        ValueError: a flag of the user contradicts one of them, or needs a GPU.
    """
    given = _read_flags(argv)
    for flag, reason in GPU_ONLY_FLAGS.items():
        if flag in given:
            raise ValueError(f"{flag}: {reason}; leave it out where there is none")
    if given.get("--context-parallel-size", "1") != "1":
        raise ValueError(
            f"--context-parallel-size {given['--context-parallel-size']}: context parallelism "
            "needs Transformer Engine's attention and a GPU; use 1 where there is none"
        )
    added = []
    for setting in CPU_FLAGS:
        for flag in setting.contrary:
            if flag in given:
                raise ValueError(f"{flag}: needs a GPU; leave it out where there is none")
        if setting.flag not in given:
            added += setting.words
        elif given[setting.flag] != setting.value:
            raise ValueError(
                f"{setting.flag} {given[setting.flag]}: without a GPU only "
                f"{' '.join(setting.words)} works; leave the flag out"
            )
    return added


def _read_flags(argv: Sequence[str]) -> dict[str, str | None]:
    """Each `--flag` with the word behind it, or None; the last one of a name wins, as in argparse.

    A flag's first value is enough here: no flag of the tables takes several.
    """
    given: dict[str, str | None] = {}
    words = [part for word in argv for part in (word.split("=", 1) if _is_flag(word) else [word])]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if _is_flag(word):
            takes_value = following and not _is_flag(following)
            given[word] = following if takes_value else None
    return given


def _is_flag(word: str) -> bool:
    return word.startswith("--")
