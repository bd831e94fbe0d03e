"""slime: LLEP by flags of its own.

    --spec megatron_llep.integration.slime layers
    --custom-megatron-before-train-step-hook-path megatron_llep.integration.slime.log_last_step

The first switches it on, the second logs. Settings stand under `llep:` in the YAML file of
`--custom-config-path`, or are `--moe-llep-*` flags where the script calls
`parse_args(add_llep_arguments)`: flags that slime does not know it drops without a word.
"""

from argparse import Namespace
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.arguments import llep_config_from_args
from megatron_llep.integration.convert import with_llep
from megatron_llep.integration.frameworks import KEY, find_seam, missing_seam, settings_from
from megatron_llep.integration.read_metrics import read_metrics
from megatron_llep.integration.spec import build_plain_layers

_PACKAGE = "slime"


def layers(*given: Any) -> TransformerBlockSubmodules:
    """Megatron's own layers with LLEP, for `--spec`.

    Args:
        given: slime's arguments, the model's configuration, the virtual pipeline stage.

    Raises:
        ValueError: as `with_llep`, or a setting is none of LLEP's.
        SeamError: slime calls it otherwise.
    """
    if len(given) != 3 or not isinstance(given[0], Namespace):
        raise missing_seam(_PACKAGE, "call spec(args, config, vp_stage)", f": it gave {given!r}")
    args, config, vp_stage = given
    llep = settings_of(args)
    if torch.distributed.is_initialized() and torch.distributed.get_rank() == 0:
        print(f"--spec: {llep}", flush=True)
    return with_llep(build_plain_layers(config, vp_stage), llep)


def settings_of(args: Namespace) -> LLEPConfig:
    """From `llep` of slime's YAML file, else from `--moe-llep-*`, else the defaults.

    Raises:
        ValueError: a setting is none of LLEP's.
    """
    if hasattr(args, KEY):
        return settings_from(getattr(args, KEY), f"--custom-config-path: {KEY}")
    return llep_config_from_args(args) if hasattr(args, "moe_llep") else LLEPConfig()


def log_last_step(
    args: Namespace, rollout_id: int, step_id: int, model: Any, *optimizer_and_scheduler: Any
) -> None:
    """Log the metrics of the step before this one; slime calls it on all ranks, before a step.

    (There is no hook after one, so the last step of a training is not logged.)
    """
    metrics = read_metrics()
    is_main_rank = find_seam(
        _PACKAGE, "slime.backends.megatron_utils.initialize", "is_megatron_main_rank"
    )
    if not metrics or not is_main_rank():
        return
    log = find_seam(_PACKAGE, "slime.observability.logging_utils", "log")
    steps = args.rollout_batch_size * args.n_samples_per_prompt // args.global_batch_size
    logged: dict[str, float] = {f"train/{name}": value for name, value in metrics.items()}
    log(args, logged | {"train/step": rollout_id * steps + step_id - 1}, step_key="train/step")
