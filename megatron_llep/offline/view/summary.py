"""What a page says in words: one sentence or two, and what it is made of."""

from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_llep.offline.recording import Recording
from megatron_llep.offline.view.details import RECORDED
from megatron_llep.offline.view.gather import imbalance, move_loans
from megatron_llep.planner.cost.model import LayerShape

if TYPE_CHECKING:
    from megatron_llep.offline.nodes import Nodes
    from megatron_llep.offline.view.build import Options

SAID = ("Nodes", "Machine")
"""Facts that are printed beside the summary."""


def find_worst(view: dict[str, Any]) -> int:
    """The cell with the largest imbalance under plain expert parallelism."""
    return int(np.argmax(view["cells"]["worstBefore"]))


def write_summary(view: dict[str, Any]) -> str:
    """The worst layer, what lending does about it, and what that is predicted to save."""
    worst = find_worst(view)
    layer = view["layers"][worst // len(view["columns"]["first"])]
    step, _, _, before, _, uses, loans = view["details"][worst]
    ran = view["recorded"] is not None
    text = (
        f"Worst is layer {layer} at step {step}: plain EP {'would load' if ran else 'loaded'} its "
        f"busiest rank {imbalance(np.array(before)):.2f} x the mean"
    )
    if not view["methods"]:
        return f"{text}."
    method = view["methods"][0]
    lent = np.array(loans[uses[0]], np.int64).reshape(-1, 3)
    after = imbalance(move_loans(np.array(before), lent, view["experts"]))
    if method == RECORDED:
        text += f"; as it ran ({view['recorded']}) it was {after:.2f} x."
    else:
        text += f"; {method} would make it {after:.2f} x."
    if view["times"] is None:
        return text
    lines = {name: sum(values) for name, values in view["times"]["lines"].items()}
    if "plain" not in lines or not lines["plain"]:
        return text
    ratio = lines["plain"] / lines[method]
    what = "Steps" if view["times"]["whole"] else "MoE layers"
    who = "it" if method == RECORDED else method
    return f"{text} {what} are predicted {ratio:.2f} x as fast with {who} as without."


def describe_facts(
    recording: Recording,
    view: dict[str, Any],
    options: "Options",
    nodes: "Nodes",
    shape: LayerShape | None,
) -> list[tuple[str, str]]:
    """Names and values: the run, what was kept of it, and what is assumed."""
    info, steps = recording.info, recording.steps
    batches = len(np.unique(recording.places[:, 1]))
    columns = view["columns"]
    P, groups = info.num_ranks, len(recording.groups)
    of_groups = "" if groups == 1 else f" ({groups} such groups)"
    facts = [
        (
            "Run",
            f"{P} ranks share tokens{of_groups}, {info.num_experts} experts, "
            f"{info.top_k} a token, {len(recording.layers)} MoE layers; planner "
            f"{info.planner}",
        ),
        ("Nodes", str(nodes)),
        (
            "Recorded",
            f"steps {steps[0]} to {steps[-1]}, up to {batches} micro-batches a step: "
            f"{recording.num_rows:,} layers of micro-batches",
        ),
        (
            "Kept",
            f"steps in {len(columns['first'])} columns; of each cell means, extremes and the "
            f"micro-batch that is worst under plain expert parallelism",
        ),
    ]
    if shape is not None and view["times"] is None:
        facts.append(("Times", "not predicted: no micro-batch has all layers"))
    elif shape is None:
        facts.append(
            (
                "Times",
                "not predicted, and planner auto left out: the recording does not say the sizes "
                "of the layers; say them with --model",
            )
        )
    else:
        facts += [
            (
                "Machine",
                options.cost.machine
                + ("; an assumption, give --machine" if options.is_assumed else ""),
            ),
            (
                "Layers",
                f"of {options.shape_from}: tokens of {shape.hidden} numbers, experts of "
                f"{shape.ffn_hidden} inside",
            ),
            (
                "Times",
                f"predicted from {view['times']['rows']:,} layers of micro-batches, chosen evenly, "
                "layers one after another; "
                + (
                    "of the whole model"
                    if view["times"]["whole"]
                    else "of MoE layers alone: the rest of the model is not in the recording"
                ),
            ),
        ]
        if view["times"]["across"]:
            facts.append(("Across nodes", _describe_across(view["times"]["across"])))
    return facts


def _describe_across(across: dict[str, list[int]]) -> str:
    """What crosses, and of that what a layer waits for."""
    parts = [
        f"{'plain EP' if name == 'plain' else name} {total / 1e6:.3g} ({busiest / 1e6:.3g})"
        for name, (total, busiest) in across.items()
    ]
    return (
        "MB of a layer of a micro-batch, forward and backward (of these on the link that is "
        f"busiest in each exchange, one way), mean: {', '.join(parts)}"
    )
