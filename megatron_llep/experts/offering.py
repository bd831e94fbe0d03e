"""A layer's experts as they can be lent: found anew when adapters were put around their linears."""

import torch

from megatron_llep.experts.changes import SeenExperts
from megatron_llep.experts.form import ExpertForm, look_at_experts
from megatron_llep.experts.kinds import make_lendable
from megatron_llep.lending.offer import Offer
from megatron_llep.lending.trained import find_trained
from megatron_llep.placement.rank_note import RankNote


class Offering:
    """Of one layer."""

    def __init__(self, experts: torch.nn.Module):
        self.lendable = make_lendable(experts)
        self._seen = SeenExperts()
        self._form = ExpertForm()

    def make_offer(self, experts: torch.nn.Module, layer: str, *, lends: bool) -> Offer:
        """What this rank has to lend, as it is now.

        What cannot be lent all ranks refuse together, once they know of each other: see `plan` of
        the dispatcher.

        Args:
            experts: the layer's.
            layer: which one, in words.
            lends: whether this rank agrees to lend.
        """
        if self._seen.have_changed(experts):
            lendable, self._form = look_at_experts(experts, layer)
            self.lendable = lendable or self.lendable
        natives = [] if self._form.refused else self.lendable.weights()
        note = RankNote(
            trains=find_trained(natives),
            lends=lends,
            refuses=self._form.refused,
            experts=self._form.digest,
        )
        return Offer(
            note=note,
            experts=self._form.text,
            natives=natives,
            weight_waits=self.lendable.parameter_hooks(),
        )
