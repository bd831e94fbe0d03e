"""The layers of a model chunk, where the routing of later ones is known when the first one runs.

Letters: T tokens of this rank, E experts, L layers of the chunk behind the first.

Megatron's router replay holds all layers' routes before a forward begins. So:

    first layer     with its own counts each rank says of how many layers behind it it knows the
                    routes; the least number counts. Their counts go in one all-gather, for all of
                    them.
    its dispatch    the second layer is planned, and its experts are lent, while tokens travel
    second layer    has its plan, and gathers and waits for nothing; its dispatch plans and lends
                    for the third; and so on
    from there on   where some rank did not know, layers count for themselves, as without replay

Ranks never decide this by what they see alone. A layer is ahead if the gathered numbers say so; the
all-gather of later layers starts together with the first layer's if at the last forward all ranks
knew some, which they learned from the same numbers, and else when these are there.

What was foretold must come true. A rank whose replay is another one by the time of the layer
raises; ranks that changed it alike all do. And each map is compared with its counts on the device:
what differs there, all ranks raise at the next forward's count.

Recomputed layers, which run one by one in backward, count for themselves.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_llep.ahead.replayed import Replayed, count_pairs, find_replayed
from megatron_llep.lending.agreement import may_lend
from megatron_llep.lending.lender import start_lending
from megatron_llep.lending.offer import Offer
from megatron_llep.lending.progress import is_in_backward
from megatron_llep.placement.counting import ASTRAY, Foretold, ForetoldTable
from megatron_llep.placement.forward import Ahead, Routed

if TYPE_CHECKING:
    from megatron_llep.layer import LLEPMoELayer


@dataclass(kw_only=True, eq=False)
class _Later:
    """A layer that has not run yet, in the forward that is under way."""

    layer: "LLEPMoELayer"
    replayed: Replayed
    offer: Offer
    foretold: Foretold
    own_counts: torch.Tensor
    """int64 [E], of this rank."""
    ahead: Ahead | None = None
    """What was planned and lent for it."""

    def prepare(self) -> Ahead:
        """Plan, if that is not done."""
        if self.ahead is None:
            decision = self.layer.token_dispatcher.decide(
                self.foretold, place=self.layer.in_words()
            )
            self.ahead = Ahead(decision=decision, offer=self.offer)
        return self.ahead

    def lend(self) -> None:
        """Plan, and start to lend what the plan wants lent."""
        ahead = self.prepare()
        if ahead.loan is None and not ahead.decision.plan.is_fallback:
            ahead.loan = self.layer.make_loan(ahead.decision, self.offer)
            start_lending(self.offer, ahead.loan)


class ModelChunk:
    """What one forward of a chunk knows of layers that come later."""

    def __init__(self, layers: Sequence["LLEPMoELayer"]):
        """Of the LLEP layers of a chunk, in the order in which they run."""
        self._layers = layers
        self._expects = False
        """Whether all ranks knew some later layer at the last forward; the same on all."""
        self._known: list[tuple[Replayed, Offer]] = []
        self._counts: torch.Tensor | None = None
        self._table: ForetoldTable | None = None
        self._num_ahead = 0
        self._later: dict[int, _Later] = {}
        self._is_astray: torch.Tensor | None = None

    @classmethod
    def join(cls, layers: Sequence["LLEPMoELayer"]) -> None:
        """Let the layers of a chunk know of each other, where that can be of use.

        Not where a schedule runs other micro-batches between the steps of a layer, or where graphs
        run routers.
        """
        if len(layers) < 2:
            return
        config = layers[0].config
        if (
            layers[0].llep.plan_ahead == "auto"
            and config.moe_enable_routing_replay
            and not config.overlap_moe_expert_parallel_comm
            and config.cuda_graph_impl == "none"
        ):
            chunk = cls(layers)
            for layer in layers:
                layer.model_chunk = chunk

    def start_count(self, layer: "LLEPMoELayer", routing_map: torch.Tensor) -> Routed:
        """Start to count what a layer has just routed, unless it is planned already.

        Args:
            layer: of the chunk.
            routing_map: bool [T, E].

        Raises:
            RuntimeError: the layer did not replay what it was about to.
        """
        dispatcher, number = layer.token_dispatcher, self._layers.index(layer)
        if number == 0 and not is_in_backward():
            self._begin(len(routing_map))
            routed = dispatcher.start_count(routing_map, layer.make_offer(), self._tell_known())
            if self._expects:
                # Behind the layer's own, which tell the ranks apart that are somewhere else.
                self._start_gathering()
            return routed
        ahead = None if is_in_backward() else self._take(layer, number, routing_map)
        if ahead is not None:
            return dispatcher.skip_count(routing_map, ahead)
        return dispatcher.start_count(routing_map, layer.make_offer())

    def go_ahead(
        self, layer: "LLEPMoELayer", known_ahead: int, meanwhile: Callable[[], None] | None
    ) -> Callable[[], None] | None:
        """Lend for the layer behind this one too, if its counts are known.

        Args:
            layer: which has its plan.
            known_ahead: if it has gathered counts, of how many layers behind it all ranks know.
            meanwhile: what it does while its tokens travel.

        Returns:
            What it is to do then.
        """
        if is_in_backward():
            return meanwhile
        number = self._layers.index(layer)
        if number == 0:
            self._num_ahead, self._expects = known_ahead, known_ahead > 0
            if self._table is not None:
                self._learn()  # it came with this layer's counts
            elif known_ahead:
                self._start_gathering()
        if number + 1 not in self._later and self._table is None:
            return meanwhile

        def do_both() -> None:
            if meanwhile is not None:
                meanwhile()
            self._learn()
            for later in self._find_next(layer):
                later.lend()

        return do_both

    def continue_next(self, layer: "LLEPMoELayer") -> None:
        """Start the second exchange of what is lent to the layer behind, if there is one."""
        if is_in_backward():
            return
        for later in self._find_next(layer):
            if later.ahead is not None and later.ahead.loan is not None:
                later.ahead.loan.continue_fetch()

    def _begin(self, num_tokens: int) -> None:
        """A forward begins: see which layers' routes this rank knows."""
        for later in self._later.values():  # of a forward that left layers out
            if later.ahead is not None and later.ahead.loan is not None:
                later.ahead.loan.drop()
        self._later, self._table, self._num_ahead = {}, None, 0
        self._known = list(self._look(num_tokens))

    def _tell_known(self) -> torch.Tensor | int:
        """Of how many later layers this rank knows; ASTRAY if some map was not as foretold."""
        if self._is_astray is None:
            return len(self._known)
        astray, self._is_astray = self._is_astray, None
        return torch.where(astray, ASTRAY, len(self._known)).to(torch.int64).view(1)

    def _take(self, layer: "LLEPMoELayer", number: int, routing_map: torch.Tensor) -> Ahead | None:
        """What was planned for a layer that has just routed; None: it is to count."""
        self._learn()
        later = self._later.get(number)
        if later is None:
            return None
        if not later.replayed.is_obeyed(len(routing_map)):
            raise RuntimeError(
                f"--moe-llep-plan-ahead {layer.llep.plan_ahead}: {layer.in_words()} replays other "
                "routes than those that were set when the forward began, from which it was "
                "planned; set all layers' routes before the forward, or give "
                "--moe-llep-plan-ahead off"
            )
        del self._later[number]
        self._compare(routing_map, later.own_counts)
        return later.prepare()

    def _look(self, num_tokens: int) -> Iterator[tuple[Replayed, Offer]]:
        """Up to the first layer of which this rank does not know, or for which it refuses."""
        for layer in self._layers[1:]:
            replayed = find_replayed(layer.router, num_tokens)
            if replayed is None:
                return
            offer = layer.make_offer()
            if offer.note.refuses:
                return
            yield replayed, offer

    def _start_gathering(self) -> None:
        """Count what this rank knows, and gather it."""
        dispatcher = self._layers[0].token_dispatcher
        E = dispatcher.config.num_moe_experts
        device = self._layers[0].router.weight.device
        self._counts = torch.zeros((len(self._layers) - 1, E), dtype=torch.int64, device=device)
        if self._known:
            targets = [replayed.target.to(device) for replayed, _ in self._known]
            self._counts[: len(targets)] = count_pairs(targets, E)
        self._table = ForetoldTable(
            self._counts,
            [offer.note for _, offer in self._known],
            group=dispatcher.tp_ep_group,
            stream=dispatcher.cuda_dtoh_stream,
        )

    def _learn(self) -> None:
        """Take what was gathered, once: layers up to the first whose experts are not alike."""
        gathered, self._table = self._table, None
        if gathered is None or not self._num_ahead:
            return
        table = gathered.wait()
        assert self._counts is not None
        tp_size = self._layers[0].token_dispatcher.tp_size
        for number in range(1, self._num_ahead + 1):
            foretold = table[number - 1]
            if not may_lend(foretold.notes, tp_size):
                return
            replayed, offer = self._known[number - 1]
            self._later[number] = _Later(
                layer=self._layers[number],
                replayed=replayed,
                offer=offer,
                foretold=foretold,
                own_counts=self._counts[number - 1],
            )

    def _find_next(self, layer: "LLEPMoELayer") -> Iterator[_Later]:
        later = self._later.get(self._layers.index(layer) + 1)
        if later is not None:
            yield later

    @torch.no_grad()
    def _compare(self, routing_map: torch.Tensor, counts: torch.Tensor) -> None:
        """Note on the device whether a map holds other pairs than were counted."""
        differs = (routing_map.sum(dim=0, dtype=torch.int64) != counts).any()
        self._is_astray = differs if self._is_astray is None else self._is_astray | differs
