"""What `megatron_llep.device` promises about torch on a machine without a GPU."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_llep.device import install_cpu_device, is_cpu_device_installed, use_cpu_if_no_gpu
from support.ranks import run_ranks

MIB = 2**20


def run_python(code, **environment):
    """Run a fresh interpreter without GPUs; return its exit status, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    return done.returncode, done.stdout, done.stderr


def test_installing_twice_changes_nothing():
    stream, zeros = torch.cuda.Stream, torch.zeros
    install_cpu_device()
    assert use_cpu_if_no_gpu() == "cpu"
    assert torch.cuda.Stream is stream
    assert torch.zeros is zeros
    assert is_cpu_device_installed()
    assert not torch.cuda.is_available()


def test_rank_0_says_so_in_one_line():
    """And no other; the hybrid script's test sees that of two ranks one does."""
    code = "from megatron_llep.device import use_cpu_if_no_gpu as use; assert use() == use()"
    status, output, errors = run_python(code, RANK="0")
    assert status == 0, errors
    assert output.count("\n") == output.count("Megatron runs on the CPU") == 1


def test_refuses_where_megatron_is_imported_already():
    code = "import megatron.core; from megatron_llep.device import install_cpu_device as f; f()"
    status, _, errors = run_python(code)
    assert status != 0
    assert "before the first import of megatron" in errors.replace("\n", " ")


GPU_VISIBLE = """
import torch
torch.cuda.is_available = lambda: True
names = {name: id(value) for name, value in vars(torch.cuda).items()}
import megatron_llep.device as device
assert device.use_cpu_if_no_gpu() == "cuda"
assert {name: id(value) for name, value in vars(torch.cuda).items()} == names
assert not device.is_cpu_device_installed()
device.install_cpu_device()
"""


def test_leaves_gpus_alone_and_refuses_to_hide_them():
    status, output, errors = run_python(GPU_VISIBLE)
    assert status != 0
    assert "RuntimeError: install_cpu_device() was called where torch sees a GPU" in errors
    assert output == ""


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 0)], ids=str)
def test_tensors_stay_on_the_cpu(device):
    tensors = [
        torch.zeros(2, device=device),
        torch.tensor([1.0], device=device),
        torch.empty_like(torch.ones(2), device=device),
        torch.ones(2).to(device),
        torch.ones(2).to(device=device, dtype=torch.float64),
        torch.ones(2).cuda(),
        torch.zeros(2, device=torch.cuda.current_device()),
    ]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert tensors[4].dtype == torch.float64


LEAVES = {
    "cpu": lambda tensor: tensor.cpu(),
    "to": lambda tensor: tensor.to("cpu"),
    "without waiting": lambda tensor: tensor.to("cpu", non_blocking=True),
    "to by keyword": lambda tensor: tensor.to(device="cpu"),
}


@pytest.mark.parametrize("leave", LEAVES.values(), ids=LEAVES)
def test_what_leaves_the_gpu_is_a_copy(leave):
    weight = torch.ones(3)
    kept = leave(weight)
    weight.add_(1)
    assert kept.tolist() == [1, 1, 1]
    assert kept.device.type == "cpu"


def test_what_stays_is_itself():
    weight = torch.ones(3)
    assert weight.cuda() is weight
    assert weight.to("cuda") is weight
    assert weight.to(torch.float32) is weight
    # As optimizers do, to be where another tensor is.
    assert weight.to(torch.ones(1).device) is weight
    assert weight.to(device=torch.ones(1).device) is weight


def test_a_copy_on_the_host_has_the_gradient_of_its_source():
    weight = torch.ones(2, requires_grad=True)
    (3 * weight.cpu()).sum().backward()
    assert weight.grad.tolist() == [3, 3]


def test_numbers_are_copied_to_the_gpu():
    numbers = np.ones(2)
    tensor = torch.as_tensor(numbers, device="cuda")
    numbers += 1
    assert tensor.tolist() == [1, 1]
    on_gpu = torch.zeros(2, device="cuda")
    assert torch.as_tensor(on_gpu, device="cuda") is on_gpu


def test_only_megatron_is_told_that_tensors_are_on_a_gpu():
    tensor = torch.ones(1)
    assert tensor.type() == "torch.FloatTensor"
    assert tensor.type(torch.float64).dtype == torch.float64
    megatron = {"__name__": "megatron.core.optimizer.optimizer"}
    exec("def get_type(tensor): return tensor.type()", megatron)
    assert megatron["get_type"](tensor) == "torch.cuda.FloatTensor"
    assert megatron["get_type"](tensor.bfloat16()) == "torch.cuda.BFloat16Tensor"


def test_streams_are_equal_and_events_measure_time():
    assert torch.cuda.Stream() == torch.cuda.current_stream()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with pytest.raises(RuntimeError, match="must be recorded"):
        start.elapsed_time(end)
    start.record()
    with torch.cuda.stream(torch.cuda.Stream(priority=-1)) as stream:
        stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.synchronize()
    end.record()
    assert 0 <= start.elapsed_time(end) < 1000


def test_the_devices_random_state_is_the_cpus():
    def draw(rank, world_size):
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

        tracker = CudaRNGStatesTracker()
        tracker.add("one", 1)
        tracker.add("two", 2)
        torch.cuda.manual_seed(5)
        plain = torch.rand(4)
        with tracker.fork("one"):
            forked = torch.rand(4)
        after = torch.rand(4)
        torch.manual_seed(5)
        expected = torch.rand(8)
        torch.manual_seed(1)
        return plain, forked, after, expected, torch.rand(4)

    plain, forked, after, expected, expected_forked = run_ranks(draw, 1)[0]
    assert torch.equal(torch.cat([plain, after]), expected)
    assert torch.equal(forked, expected_forked)


def test_dropout_of_a_recomputed_block_is_that_of_its_first_pass():
    def recompute(rank, world_size):
        from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker

        from support.layout import Layout, use_layout

        seen = []

        def drop(x):
            with get_cuda_rng_tracker().fork():
                kept = torch.nn.functional.dropout(x, 0.5)
            seen.append(kept.detach().clone())
            return kept

        with use_layout(Layout()):
            x = torch.ones(64, requires_grad=True)
            y = checkpoint(drop, False, x)
            torch.rand(3)
            y.sum().backward()
        return seen, x.grad

    (first, again), gradient = run_ranks(recompute, 1)[0]
    assert torch.equal(first, again)
    assert torch.equal(first, gradient)


def test_memory_statistics_are_those_of_the_process():
    def measure(rank, world_size):
        before = torch.cuda.memory_allocated()
        block = torch.ones(64 * MIB // 4)
        during = torch.cuda.memory_allocated()
        del block
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return before, during, peak, torch.cuda.memory_stats()

    before, during, peak, stats = run_ranks(measure, 1)[0]
    assert 60 * MIB < during - before < 80 * MIB
    # The kernel counts in batches of pages: the two differ by some 100 kB.
    assert during - MIB < peak < during + 16 * MIB
    assert stats["allocated_bytes.all.peak"] < peak - 40 * MIB


def test_ragged_all_gather():
    def gather(rank, world_size):
        mine = torch.arange(3.0 * rank).view(rank, 3) + 10 * rank
        parts = [torch.empty(other, 3) for other in range(world_size)]
        torch.distributed.all_gather(parts, mine)
        return parts

    for parts in run_ranks(gather, 3):
        for other, part in enumerate(parts):
            assert torch.equal(part, torch.arange(3.0 * other).view(other, 3) + 10 * other)


def test_all_to_all_takes_split_sizes_as_tensors():
    def exchange(rank, world_size):
        sent = torch.tensor([1, 2])
        received = torch.tensor([rank + 1, rank + 1])
        output = torch.empty(2 * (rank + 1))
        torch.distributed.all_to_all_single(output, torch.full((3,), rank * 1.0), received, sent)
        return output.tolist()

    assert run_ranks(exchange, 2) == [[0, 1], [0, 0, 1, 1]]


def test_megatrons_pointwise_functions_are_not_compiled():
    def add(x):
        return x + 1

    assert torch.compile(add) is add
    assert torch.compile(dynamic=True)(add) is add
    assert torch.jit.script(add) is add


def test_free_memory_is_the_machines():
    free, total = torch.cuda.mem_get_info()
    assert 0 < free < total
    # Firmware and kernel keep some of it.
    assert total <= torch.cuda.get_device_properties().total_memory
    assert torch.cuda.memory.mem_get_info("cuda:0")[1] == total


def test_megatron_training_starts_without_cuda():
    def prepare(rank, world_size):
        from megatron.training import training

        from megatron_llep.device import prepare_megatron_training

        prepare_megatron_training()
        prepare_megatron_training()
        from megatron.core.datasets.utils import compile_helpers

        compile_helpers()  # Megatron's own ends the process, as a wheel has nothing to compile.
        first = training.initialize_megatron
        return first.keywords, hasattr(first.func, "keywords")

    keywords, is_nested = run_ranks(prepare, 1)[0]
    assert keywords == {"allow_no_cuda": True}
    assert not is_nested


def test_a_block_on_another_device_makes_tensors_there():
    with torch.device("meta"):
        assert torch.zeros(2).is_meta
        assert torch.tensor([1.0]).is_meta
    assert not torch.zeros(2).is_meta
