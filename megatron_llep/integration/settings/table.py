"""All settings of the table, and what it says of one configuration."""

from argparse import Namespace
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from megatron_llep.compat import read_flag
from megatron_llep.integration import graphs
from megatron_llep.integration.settings.refused import REFUSED
from megatron_llep.integration.settings.refused_elsewhere import REFUSED_ELSEWHERE
from megatron_llep.integration.settings.replaced import REPLACED
from megatron_llep.integration.settings.setting import Setting
from megatron_llep.integration.settings.supported import SUPPORTED
from megatron_llep.integration.settings.untried import UNTRIED

SETTINGS: tuple[Setting, ...] = (*SUPPORTED, *REPLACED, *REFUSED_ELSEWHERE, *REFUSED, *UNTRIED)


def find_refusals(source: Any) -> Iterator[str]:
    """What the table refuses in a source: flag, value, reason and way out of each."""
    for setting in REFUSED:
        if setting.is_set(source):
            read = setting.value or attrgetter(setting.name)
            value = read(source)
            yield (
                f"{setting.flag} {value}: not supported with --moe-llep; {setting.text}"
                f"{_in_python(setting, source)}"
            )


def find_notices(source: Any, dispatcher: str = "alltoall") -> list[str]:
    """What runs in place of what a source has set, a line each.

    Args:
        source: a configuration.
        dispatcher: the value of `--moe-llep-dispatcher`.
    """
    return [
        f"{setting.describe(source)}: {setting.text}"
        for setting in _find_replaced(source, dispatcher)
    ] + graphs.notices(source)


def find_built_in(config: Any) -> Iterator[str]:
    """What layers that are built by a configuration keep for good: flag and way out of each."""
    for setting in REPLACED:
        if setting.is_built_in and setting.is_set(config):
            yield (
                f"{setting.describe(config)}: the model was built with it, and keeps it; leave the "
                f"flag out{_in_python(setting, config)}"
            )


def replace_settings(config: Any, dispatcher: str = "alltoall") -> list[str]:
    """Make a model's configuration say what runs; Megatron reads it in every forward.

    Experts pad their rows unless it says that the router or a dispatcher has done so.

    Args:
        config: changed in place.
        dispatcher: the value of `--moe-llep-dispatcher`.

    Returns:
        The notices. Of what has been replaced, a second call returns none.
    """
    notices = find_notices(config, dispatcher)
    for setting in list(_find_replaced(config, dispatcher)):
        for name, value in setting.runs.items():
            setattr(config, name, value)
    graphs.keep_planning_out_of_graphs(config)
    return notices


def _in_python(setting: Setting, source: Any) -> str:
    """The field of a configuration: where it is made in Python there is no flag to leave out."""
    if isinstance(source, Namespace):
        return ""
    return f" (in Python the field is {type(source).__name__}.{setting.name})"


def _find_replaced(source: Any, dispatcher: str) -> Iterator[Setting]:
    return (each for each in REPLACED if dispatcher in each.dispatchers and each.is_set(source))


def replace_in_loop(args: Namespace) -> None:
    """Make Megatron's arguments say what runs, in place, where its training loop reads them itself.

    Others are left as given: they are stored in checkpoints.
    """
    for setting in REPLACED:
        if setting.is_read_by_loop:
            vars(args).update(setting.runs)
    graphs.keep_planning_out_of_graphs(args)


def read_arguments_as_config(args: Namespace) -> Namespace:
    """Megatron's parsed arguments, also under the names of `TransformerConfig`.

    Megatron itself makes a configuration of them only after it has validated them.
    """
    expert_tp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    shards = read_flag(args, "expert_tensor_parallel_num_weight_shards") or expert_tp
    renamed = {
        "num_moe_experts": args.num_experts,
        "cuda_graph_modules": args.cuda_graph_modules or args.cuda_graph_scope_deprecated,
        "cpu_offloading": args.cpu_offloading_num_layers > 0,
        "fp8_param": args.fp8_param_gather,
        "expert_gtp_weight_remat_size": shards // expert_tp,
    }
    return Namespace(**(vars(args) | renamed))
