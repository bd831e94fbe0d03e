"""Switching LLEP on: in a layer specification, or in a model that is built but not yet wrapped.

Both ends in the same `LLEPMoELayer`. Specifications are what training scripts pass around; the
model hook also reaches layers whose specification Megatron derives by itself, such as those of
multi-token prediction.

All ranks check before any of them changes anything, and they refuse together.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.ahead.model_chunk import ModelChunk
from megatron_llep.config import LLEPConfig
from megatron_llep.integration.compile_once import NOT_CACHED, compile_once_per_host
from megatron_llep.integration.model_groups import find_groups
from megatron_llep.integration.mtp_layers import number_mtp_layers, with_numbered_mtp
from megatron_llep.integration.observe import observe_model, observe_spec
from megatron_llep.integration.replace_layers import replace_moe_layers
from megatron_llep.integration.settings.notices import NOBODY_TO_LEND_TO, Notices
from megatron_llep.integration.settings.table import find_built_in, replace_settings
from megatron_llep.layer import LLEPMoELayer
from megatron_llep.lending.groups import gather_objects
from megatron_llep.lending.progress import Progress
from megatron_llep.lending.shared import SharedLending
from megatron_llep.metrics import install_tracker
from megatron_llep.observe.recorder import prepare_recorder
from megatron_llep.validation import check_layer, check_same_on_all_ranks, refuse_on_all_ranks


def with_llep(
    spec: Any, config: LLEPConfig, pg_collection: ProcessGroupCollection | None = None
) -> Any:
    """Copy a specification, with every `MoELayer` in it replaced.

    All ranks call it, for each model chunk, before they build it; also those whose chunk holds no
    MoE layer, because all of them make the process groups in which experts are lent. Layers whose
    expert-parallel group is one rank stay plain.

    Args:
        spec: of a layer, a block of layers (`TransformerBlockSubmodules`) or a hybrid stack.
        config: LLEP's settings; `enabled=False` returns the specification as it is. With
            `planner="observe"` the layers stay Megatron's, and their routers are counted.
        pg_collection: the groups that the model will be built with. Default: Megatron's global
            ones.

    Raises:
        ValueError: on all ranks; names what some rank refuses, and the way out.
    """
    if not _all_agree(config, "with_llep"):
        return spec
    if config.observes:
        return observe_spec(spec, config, pg_collection)
    shared, notices = SharedLending(), Notices()
    replaced, groups, refusal = spec, [], None
    try:
        settings = {"llep": config, "shared": shared, "notices": notices}
        replaced = replace_moe_layers(spec, settings)
        if replaced is not spec:
            own = find_groups(pg_collection)
            if own.ep.size() > 1:
                groups.append(own)
            else:
                replaced = spec
                notices.add([NOBODY_TO_LEND_TO])
    except ValueError as error:
        refusal = str(error)
    refuse_on_all_ranks(refusal)
    shared.recorder = prepare_recorder(config, [(each, None) for each in groups])
    if not compile_once_per_host(config, needed=bool(groups)):
        notices.add([NOT_CACHED])
    install_tracker()
    shared.prepare_groups(groups, join_replicas=config.replicas == "expert-dp")
    if config.ranks_per_node is None:
        notices.add(shared.list_mixed_nodes())
    notices.tell()
    return with_numbered_mtp(replaced) if replaced is not spec else spec


def convert_model(
    model: Sequence[torch.nn.Module],
    config: LLEPConfig,
    pg_collection: ProcessGroupCollection | None = None,
    progress: Progress | None = None,
    notices: Notices | None = None,
) -> list[torch.nn.Module]:
    """Convert every MoE layer of a built model, before DDP wraps it.

    All ranks call it, also those whose chunks hold no MoE layer. Layers whose expert-parallel group
    is one rank stay plain. Where something of Megatron's is replaced, the model's configuration
    says what runs, and rank 0 prints a line.

    Args:
        model: the model chunks of this rank's pipeline stage.
        config: LLEP's settings; `enabled=False` changes nothing. With `planner="observe"` the
            layers stay Megatron's, and their routers are counted.
        pg_collection: the model's process groups. Default: those that it was built with, else
            Megatron's global ones.
        progress: told by the layers where this rank is; a caller adds it to errors of training.
        notices: what the caller has replaced already, to be told in the same block.

    Returns:
        The same chunks.

    Raises:
        ValueError: on all ranks; names the layer that some rank refuses, and the way out. No layer
            is converted then, on any rank.
    """
    chunks, notices = list(model), notices or Notices()
    if not _all_agree(config, "convert_model"):
        return chunks
    if config.observes:
        observe_model(chunks, config, pg_collection)
        return chunks
    found: list[tuple[MoELayer, ProcessGroupCollection]] = []
    refusal, is_alone = None, False
    for number, chunk in enumerate(chunks):
        for name, layer in chunk.named_modules():
            if isinstance(layer, MoELayer) and not isinstance(layer, LLEPMoELayer):
                try:
                    groups = find_groups(pg_collection, chunk)
                    if groups.ep.size() > 1:
                        _check_convertible(layer, config)
                        _check_outside_graphs(chunk.get_submodule(name.rpartition(".")[0]))
                        found.append((layer, groups))
                    else:
                        is_alone = True
                except ValueError as error:
                    refusal = refusal or f"{error} ({name or 'the layer'} of chunk {number})"
    refuse_on_all_ranks(refusal)
    recorder = prepare_recorder(config, [(groups, layer.config) for layer, groups in found])
    if not compile_once_per_host(config, needed=bool(found)):
        notices.add([NOT_CACHED])
    install_tracker()
    shared = SharedLending(progress)
    shared.recorder = recorder
    shared.prepare_groups(
        [groups for _, groups in found], join_replicas=config.replicas == "expert-dp"
    )
    if config.ranks_per_node is None:
        notices.add(shared.list_mixed_nodes())
    # Rank 0 may have a stage without MoE layers, and tells what concerns the others.
    ranks_lend, ranks_are_alone = zip(*gather_objects((bool(found), is_alone)), strict=True)
    if any(ranks_lend):
        for config_of_model in _list_configurations(chunks):
            notices.add(replace_settings(config_of_model, config.dispatcher))
    if any(ranks_are_alone):
        notices.add([NOBODY_TO_LEND_TO])
    notices.tell()
    for layer, groups in found:
        LLEPMoELayer.convert(layer, llep=config, shared=shared, pg_collection=groups)
    for chunk in chunks:
        ModelChunk.join([each for each in chunk.modules() if isinstance(each, LLEPMoELayer)])
    number_mtp_layers(chunks)
    return chunks


def llep_hook(config: LLEPConfig) -> Callable[[list[torch.nn.Module]], list[torch.nn.Module]]:
    """`convert_model` as a hook for `pre_wrap_hooks` of Megatron's configuration of a model."""
    return partial(convert_model, config=config)


def _list_configurations(chunks: Sequence[torch.nn.Module]) -> list[TransformerConfig]:
    """Each once; some of Megatron's modules have a copy."""
    configs = [getattr(module, "config", None) for chunk in chunks for module in chunk.modules()]
    return list(
        {id(each): each for each in configs if isinstance(each, TransformerConfig)}.values()
    )


def _all_agree(config: LLEPConfig, name: str) -> bool:
    """Whether LLEP is to be switched on; the settings are the same on all ranks, else they raise.

    Also where it is off here: another rank may have it on.
    """
    if not dist.is_initialized():
        if config.enabled:
            raise ValueError(
                f"--moe-llep: torch.distributed is not initialised; call {name} after "
                "init_process_group and Megatron's initialize_model_parallel, where the model is "
                "built"
            )
        return False
    check_same_on_all_ranks(config)
    return config.enabled


def _check_convertible(layer: MoELayer, config: LLEPConfig) -> None:
    if type(layer) is not MoELayer:
        raise ValueError(
            f"--moe-llep: cannot convert a {type(layer).__name__}; "
            "only megatron.core's MoELayer itself is supported"
        )
    for refusal in find_built_in(layer.config):
        raise ValueError(refusal)
    check_layer(layer, config)


def _check_outside_graphs(owner: torch.nn.Module) -> None:
    """Check the module that an MoE layer is part of: Megatron's own graphs may hold all of it."""
    if hasattr(owner, "cudagraph_manager"):
        raise ValueError(
            f"--cuda-graph-impl local: its graph of a {type(owner).__name__} would hold the "
            "experts, and plans are made on the host; use --cuda-graph-impl transformer_engine"
        )
