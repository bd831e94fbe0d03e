"""The planners compiled where a model is converted, by one rank of each host for the others.

Else all ranks of a host would compile the same at once, which takes its CPUs a while.
"""

import socket

import torch.distributed as dist

from megatron_llep.config import LLEPConfig
from megatron_llep.lending.groups import gather_objects
from megatron_llep.observe.outlook import PLANNERS as OUTLOOK
from megatron_llep.planner.compiled import compile_planners
from megatron_llep.validation import refuse_on_all_ranks

NOT_CACHED = (
    "the planners were compiled for this run alone, as no folder for their machine code can be "
    "written: let NUMBA_CACHE_DIR name one"
)


def compile_once_per_host(config: LLEPConfig, *, needed: bool) -> bool:
    """Compile what these settings plan with, so that no training step waits for it.

    All ranks of the job call it. Of those on a host that need it the first compiles, while the
    others wait. Then they load what it has left; where they cannot, each compiles for itself.

    Args:
        config: the same on all ranks.
        needed: whether this rank plans.

    Returns:
        Whether all machine code is kept for the next run; the same on all ranks.

    Raises:
        ValueError: on all ranks; some rank could not compile.
    """
    hosts = gather_objects(socket.gethostname() if needed else None)
    firsts = {hosts.index(host) for host in hosts if host is not None}
    if not firsts:
        return True
    is_cached = True
    for turn in (firsts, set(range(len(hosts))) - firsts):
        refusal = None
        if needed and dist.get_rank() in turn:
            try:
                is_cached = compile_planners(
                    OUTLOOK if config.observes else (config.planner,),
                    replicas=config.replicas != "none",
                    nodes=config.ranks_per_node is not None or len(firsts) > 1,
                )
            except ImportError as error:
                refusal = f"--moe-llep: the planners need numba ({error}); install it"
            except Exception as error:  # whatever it is, no rank may wait for this one
                refusal = (
                    f"--moe-llep: the planners do not compile ({type(error).__name__}: {error})"
                )
        refuse_on_all_ranks(refusal)
    return all(gather_objects(is_cached))
