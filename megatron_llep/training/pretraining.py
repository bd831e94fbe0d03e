"""Pretraining, as the scripts start it: GPT models and hybrid ones differ in nothing else."""

from megatron_llep.training.data import build_datasets, check_pretraining
from megatron_llep.training.job import Job, run
from megatron_llep.training.step import forward_step


def run_pretraining(*, is_hybrid: bool, started: float) -> None:
    """Read `sys.argv` and pretrain.

    Args:
        is_hybrid: whether models are hybrid.
        started: `time.time()` when the process began.

    Raises:
        ValueError: as `run`.
    """
    job = Job(
        build_datasets=build_datasets,
        forward_step=forward_step,
        check=check_pretraining,
        is_hybrid=is_hybrid,
    )
    run(job, started=started)
