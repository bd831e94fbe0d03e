"""Peak memory of the worst rank, after training."""

import torch
import torch.distributed as dist
from megatron.training import get_args, get_tensorboard_writer, print_rank_last

SCALAR = "peak-memory-worst-rank-bytes"


def report_peak_memory() -> int:
    """Print and log the most memory that any rank had allocated; every rank calls it.

    On a GPU this is what torch's allocator counts. On the CPU it is the resident size of the
    process, Python and its libraries included.

    Returns:
        Bytes.
    """
    peak = torch.tensor([torch.cuda.max_memory_allocated()], device=torch.cuda.current_device())
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    worst = int(peak.item())
    print_rank_last(f"peak memory of the worst rank: {worst / 2**20:.1f} MiB")
    writer = get_tensorboard_writer()
    if writer is not None:
        writer.add_scalar(SCALAR, worst, get_args().train_iters)
        writer.flush()
    return worst
