"""Watching the routers of a model or a specification, for `--moe-llep-planner observe`.

Megatron's layers and dispatchers stay, and nothing that Megatron takes is refused.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.compile_once import NOT_CACHED, compile_once_per_host
from megatron_llep.integration.model_groups import find_groups
from megatron_llep.integration.mtp_layers import number_mtp_layers, with_numbered_mtp
from megatron_llep.integration.settings.notices import Notices
from megatron_llep.integration.spec_parts import copy_with, replace_parts
from megatron_llep.layer import LLEPMoELayer
from megatron_llep.lending.groups import gather_objects, ranks_of
from megatron_llep.lending.hosts import Hosts
from megatron_llep.metrics import install_tracker
from megatron_llep.observe.counts import Sharers
from megatron_llep.observe.other_work import predict_other_seconds
from megatron_llep.observe.outlook import Outlook
from megatron_llep.observe.recorder import Recorder, prepare_recorder
from megatron_llep.observe.recording_info import make_info
from megatron_llep.observe.watch import watch_router
from megatron_llep.planner import Topology
from megatron_llep.planner.cost.layer import get_layer_cost
from megatron_llep.planner.cost.presets import get_cost_model
from megatron_llep.validation import find_all_refusals, refuse_on_all_ranks

ASSUMED_MACHINE = "h200"
"""For which gains are predicted where nobody names a machine."""
IN_GRAPHS = (
    "--moe-llep-planner observe: a CUDA graph holds the routers, and what is replayed cannot be "
    "counted; leave moe_router out of --cuda-graph-modules to see their routing"
)


def observe_model(
    chunks: Sequence[torch.nn.Module],
    llep: LLEPConfig,
    pg_collection: ProcessGroupCollection | None,
) -> None:
    """Count what the routers of a built model choose; all ranks call it.

    Args:
        chunks: of this rank's pipeline stage, with MoE layers or without.
        llep: the same on all ranks.
        pg_collection: the model's groups, as for `convert_model`.

    Raises:
        ValueError: on all ranks; a setting of LLEP's does not fit the model.
    """
    found: list[tuple[MoELayer, ProcessGroupCollection]] = []
    refusal = None
    for chunk in chunks:
        for layer in chunk.modules():
            if isinstance(layer, MoELayer) and not isinstance(layer, LLEPMoELayer):
                try:
                    its_groups = find_groups(pg_collection, chunk)
                    check_outlook(layer.config, llep, its_groups)
                    found.append((layer, its_groups))
                except ValueError as error:
                    refusal = refusal or str(error)
    refuse_on_all_ranks(refusal)
    other_seconds = predict_other_seconds(
        chunks, get_cost_model(llep.cost_model or ASSUMED_MACHINE)
    )
    configs, groups = [layer.config for layer, _ in found], [groups for _, groups in found]
    hosts = Hosts.gather()
    _prepare(llep, hosts, configs, groups, other_seconds)
    recorder = prepare_recorder(llep, list(zip(groups, configs, strict=True)))
    watch = Watch(llep, hosts, recorder)
    for layer, its_groups in found:
        watch.add(layer.router, its_groups)
    number_mtp_layers(chunks)


def observe_spec(spec: Any, llep: LLEPConfig, pg_collection: ProcessGroupCollection | None) -> Any:
    """Copy a specification, so that the routers that are built of it are counted.

    All ranks call it, also those whose part holds no MoE layer.

    Args:
        spec: as for `with_llep`.
        llep: the same on all ranks.
        pg_collection: the groups that the model will be built with.

    Raises:
        ValueError: on all ranks; there are no groups.
    """
    watch = Watch(llep, Hosts.gather())
    watched = replace_parts(spec, partial(_watch_submodules, watch))
    refusal, groups = None, []
    try:
        if watched is not spec:
            groups.append(find_groups(pg_collection))
    except ValueError as error:
        refusal = str(error)
    refuse_on_all_ranks(refusal)
    watch.recorder = prepare_recorder(llep, [(each, None) for each in groups])
    _prepare(llep, watch.hosts, [], groups, other_seconds=0.0)  # there is no model yet
    return with_numbered_mtp(watched) if watched is not spec else spec


def check_outlook(
    config: TransformerConfig, llep: LLEPConfig, groups: ProcessGroupCollection
) -> None:
    """Check that plans could be made with these settings.

    Raises:
        ValueError: names flag, value and remedy.
    """
    for refusal in find_all_refusals(config, llep):
        raise ValueError(refusal)
    if groups.ep.size() % (llep.ranks_per_node or 1):
        raise ValueError(
            f"--moe-llep-ranks-per-node {llep.ranks_per_node}: must divide the {groups.ep.size()} "
            "ranks that share tokens"
        )


class Watch:
    """Watches the routers of one model."""

    def __init__(self, llep: LLEPConfig, hosts: Hosts, recorder: Recorder | None = None) -> None:
        self._llep = llep
        self.hosts = hosts
        self.recorder = recorder
        self._sharers: dict[str, Sharers] = {}  # by the name of their group

    def __deepcopy__(self, memo: dict[int, Any]) -> "Watch":
        """Itself: routers built from a copied specification are watched as one model's."""
        return self

    def add(self, router: Router, groups: ProcessGroupCollection) -> None:
        """Count what a router chooses from now on."""
        name = groups.tp_ep.group_name
        if name not in self._sharers:
            ranks_per_host = self.hosts.find_ranks_per_node(ranks_of(groups.ep))
            self._sharers[name] = Sharers(
                group=groups.tp_ep,
                num_ranks=groups.ep.size(),
                outlook=make_outlook(router.config, self._llep, ranks_per_host),
            )
            if self.recorder is not None and groups.tp_ep.rank() == 0:
                info = make_info(router.config, self._llep, groups, ranks_per_host)
                self.recorder.open(info, groups)
                self.recorder.listen()
        watch_router(router, self._sharers[name])

    def build(
        self,
        builder: Any,
        *,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        **more: Any,
    ) -> Router:
        """Build a router as a specification asks for, and watch it."""
        groups = find_groups(pg_collection)
        check_outlook(config, self._llep, groups)
        router = builder(config=config, pg_collection=pg_collection, **more)
        self.add(router, groups)
        return router


def make_outlook(
    config: TransformerConfig, llep: LLEPConfig, ranks_per_host: int | None = None
) -> Outlook:
    """How to plan ahead for the layers of a model.

    Args:
        config: of the model.
        llep: of the run.
        ranks_per_host: of the ranks that share tokens, as their hostnames tell.
    """
    machine = llep.cost_model or ASSUMED_MACHINE
    cost = get_layer_cost(config, replace(llep, cost_model=machine))
    assert cost is not None, "a machine is named"
    return Outlook(
        options={
            "max_foreign": llep.max_foreign_experts,
            "capacity_factor": llep.capacity_factor,
            "min_tokens_per_gemm": llep.min_tokens_per_gemm,
            "imbalance_threshold": llep.imbalance_threshold,
            "tolerance": llep.tolerance,
        },
        topology=Topology(
            ranks_per_node=llep.ranks_per_node or ranks_per_host,
            lend_across_nodes=llep.lend_to == "any_node",
        ),
        cost=cost,
        is_assumed=llep.cost_model is None,
    )


def _watch_submodules(watch: Watch, part: Any, path: str) -> Any:
    if not isinstance(part, MoESubmodules):
        return part
    return copy_with(part, router=partial(watch.build, part.router))


def _prepare(
    llep: LLEPConfig,
    hosts: Hosts,
    configs: Sequence[TransformerConfig],
    groups: Sequence[ProcessGroupCollection],
    other_seconds: float,
) -> None:
    """What ranks do together before the first step: compile planners, tell what is assumed."""
    notices = Notices()
    sharing = [ranks_of(each.ep) for each in groups if each.ep.size() > 1]
    if not compile_once_per_host(llep, needed=bool(sharing)):
        notices.add([NOT_CACHED])
    tracker = install_tracker()
    tracker.reducer.other_seconds = other_seconds
    nodes = {_count_nodes(llep, hosts, ranks) for ranks in sharing}
    mixed = [] if llep.ranks_per_node else hosts.list_mixed(sharing)
    # Rank 0 may have a stage without MoE layers, and tells what concerns the others.
    of_ranks = gather_objects((nodes, mixed, any(map(_captures_router, configs))))
    all_nodes, all_mixed, in_graphs = zip(*of_ranks, strict=True)
    where = _describe_nodes(set().union(*all_nodes))
    tracker.machine = (llep.cost_model or f"{ASSUMED_MACHINE} (assumed)") + where
    if any(all_nodes):
        notices.add([_describe_machine(llep, where)])
    notices.add([line for lines in all_mixed for line in lines][:1])
    if any(in_graphs):
        notices.add([IN_GRAPHS])
    notices.tell()


def _count_nodes(llep: LLEPConfig, hosts: Hosts, ranks: Sequence[int]) -> int:
    return len(ranks) // (llep.ranks_per_node or hosts.find_ranks_per_node(ranks) or len(ranks))


def _describe_nodes(numbers: set[int]) -> str:
    """Where ranks that share tokens are; nothing is said where all are on one node."""
    if numbers <= {1}:
        return ""
    return f", on {' or '.join(map(str, sorted(numbers)))} nodes"


def _describe_machine(llep: LLEPConfig, where: str) -> str:
    model = get_cost_model(llep.cost_model or ASSUMED_MACHINE)
    line = (
        "--moe-llep-planner observe: plain expert parallelism runs; what lending would gain is "
        f"predicted for {model.machine}{where}"
    )
    if llep.cost_model is None:
        line += "; this is assumed, name the machine at hand by --moe-llep-cost-model"
    return line


def _captures_router(config: TransformerConfig) -> bool:
    """Whether routers are replayed in CUDA graphs of Megatron's."""
    if config.cuda_graph_impl not in ("local", "transformer_engine"):
        return False
    modules = config.cuda_graph_modules or []
    return not modules or bool({CudaGraphModule.moe_router, CudaGraphModule.moe} & {*modules})
