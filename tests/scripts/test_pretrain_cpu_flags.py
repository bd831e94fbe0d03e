"""Which flags are added, and which refused, where no GPU is."""

import argparse

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_llep.training.cpu_flags import CPU_FLAGS, GPU_FLAGS, flags_without_gpu

ADDED = [
    *("--distributed-backend", "gloo", "--transformer-impl", "local"),
    *("--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"),
    *("--no-persist-layer-norm", "--no-rope-fusion"),
]


@pytest.fixture(scope="module")
def megatron_actions():
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return {flag: action for action in parser._actions for flag in action.option_strings}


def test_added_flags():
    assert flags_without_gpu([]) == ADDED
    assert flags_without_gpu(["--num-layers", "2", "--swiglu"]) == ADDED


@pytest.mark.parametrize(
    "own",
    [
        ["--distributed-backend", "gloo"],
        ["--distributed-backend=gloo"],
        ["--no-rope-fusion"],
        ["--no-rope-fusion", "--transformer-impl", "local", "--swiglu"],
    ],
)
def test_own_flags_are_not_repeated(own):
    added = flags_without_gpu(own)
    assert [word for word in ADDED if word not in " ".join(own).replace("=", " ").split()] == added


def test_all_own_flags():
    assert flags_without_gpu(ADDED) == []


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--distributed-backend", "nccl"], "--distributed-backend nccl"),
        (["--distributed-backend=nccl"], "--distributed-backend nccl"),
        (["--transformer-impl", "transformer_engine"], "--transformer-impl transformer_engine"),
        (["--transformer-impl", "local", "--transformer-impl", "inference_optimized"], "inference"),
        (["--no-rope-fusion=yes"], "--no-rope-fusion yes"),
        (["--context-parallel-size", "2"], "--context-parallel-size 2"),
        (["--context-parallel-size=4"], "--context-parallel-size 4"),
        (["--moe-grouped-gemm", "--swiglu"], "--moe-grouped-gemm"),
        (["--attention-backend", "flash"], "--attention-backend flash"),
        (["--cross-entropy-fusion-impl=te"], "--cross-entropy-fusion-impl te"),
        (["--cuda-graph-impl", "local"], "--cuda-graph-impl local"),
        (["--moe-token-dispatcher-type", "flex"], "--moe-token-dispatcher-type flex"),
        (["--recompute-modules", "moe", "layernorm"], "--recompute-modules moe layernorm"),
        (["--fp8-format", "hybrid"], "--fp8-format hybrid"),
        (["--cpu-offloading-num-layers", "1"], "--cpu-offloading-num-layers 1"),
    ],
)
def test_contrary_flags_are_named(argv, named):
    with pytest.raises(ValueError, match="leave the flag out") as error:
        flags_without_gpu(argv)
    assert named in str(error.value)


REPLACED = [
    *("--moe-token-dispatcher-type", "flex", "--moe-enable-deepep"),
    *("--moe-permute-fusion", "--moe-permute-fusion-into-hybridep"),
]
LENDING = ["--moe-llep", "--expert-model-parallel-size", "2"]


def test_what_llep_replaces_needs_no_gpu():
    assert flags_without_gpu(REPLACED + LENDING) == ADDED
    # With one expert-parallel rank plain Megatron runs.
    for plain in ([], ["--moe-llep"], [*LENDING, "--expert-model-parallel-size=1"], LENDING[1:]):
        with pytest.raises(ValueError, match="GPU") as error:
            flags_without_gpu(REPLACED + plain)
        assert all(flag in str(error.value) for flag in REPLACED if flag.startswith("--"))


def test_all_contrary_flags_are_named_at_once():
    argv = ["--fp8-format", "hybrid", "--transformer-impl", "transformer_engine", *REPLACED]
    with pytest.raises(ValueError, match="GPU") as error:
        flags_without_gpu([*argv, *LENDING, "--moe-grouped-gemm"])
    named = [line.split(":")[0] for line in str(error.value).splitlines()]
    assert named == [
        "--fp8-format hybrid",
        "--moe-grouped-gemm",
        "--transformer-impl transformer_engine",
    ]


@pytest.mark.parametrize(
    "argv",
    [
        ["--context-parallel-size", "1"],
        ["--context-parallel-size", "2", "--context-parallel-size=1"],  # the last one counts
        ["--attention-backend", "unfused"],
        ["--cross-entropy-fusion-impl", "native", "--cross-entropy-loss-fusion"],
        ["--cuda-graph-impl", "none"],
        ["--moe-token-dispatcher-type", "alltoall"],
        ["--recompute-modules", "moe", "core_attn"],
        ["--cpu-offloading-num-layers=0"],
        ["--bf16"],
    ],
)
def test_what_works_is_let_through(argv):
    assert flags_without_gpu(argv) == ADDED


@pytest.mark.parametrize("cpu_flag", CPU_FLAGS, ids=lambda each: each.flag)
def test_added_flags_are_megatrons(cpu_flag, megatron_actions):
    action = megatron_actions[cpu_flag.flag]
    assert (action.nargs == 0) == (cpu_flag.value is None)
    if cpu_flag.value is not None:
        assert cpu_flag.value in action.choices
        assert action.default != cpu_flag.value  # or it need not be added


@pytest.mark.parametrize("gpu_flag", GPU_FLAGS, ids=lambda each: each.flag)
def test_refused_flags_are_megatrons(gpu_flag, megatron_actions):
    action = megatron_actions[gpu_flag.flag]
    values = gpu_flag.refused + gpu_flag.works
    if action.nargs == 0:
        assert not values
    elif action.choices is not None:
        names = {getattr(choice, "name", choice) for choice in action.choices}
        assert set(values) <= names
    default = getattr(action.default, "name", action.default)
    if values and default is not None:  # Megatron's own default must be let through
        assert not gpu_flag.is_refused([str(default)])


def test_no_flag_is_in_a_table_twice():
    flags = [each.flag for each in (*CPU_FLAGS, *GPU_FLAGS)]
    assert len(flags) == len(set(flags))


def test_the_back_ends_that_llep_keeps_need_a_gpu():
    with pytest.raises(ValueError, match="its back ends need GPUs") as error:
        flags_without_gpu([*REPLACED, *LENDING, "--moe-llep-dispatcher", "flex"])
    assert "--moe-permute-fusion:" not in str(error.value)
