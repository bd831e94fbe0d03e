"""LLEP's part of the line that Megatron's training log prints."""

from collections.abc import Iterator, Mapping

from megatron_llep.metrics.names import BUSIEST, METRICS, PERCENTILES, PREFIX, SPREAD
from megatron_llep.observe.outlook import PLANNERS


def format_line(scalars: Mapping[str, float], machine: str) -> str:
    """What was measured, and what planners would have gained, as Megatron separates it.

    Args:
        scalars: by the names under which they are logged; empty if nothing ran.
        machine: for which gains are predicted, in words.
    """
    values = {name.removeprefix(PREFIX): value for name, value in scalars.items()}
    parts = [f"{each.name}: {values[each.name]:.2f}" for each in METRICS if each.name in values]
    parts += _describe_layers(values)
    if "expert_tokens_max" in values:
        parts.append(
            f"tokens per expert: {values['expert_tokens_min']:.0f} to "
            f"{values['expert_tokens_max']:.0f}, std {values['expert_tokens_std']:.1f}, "
            f"idle {values['idle_experts']:.1%}"
        )
    busiest = list(_describe_busiest(values))
    if busiest:
        parts.append(f"busiest experts: {', '.join(busiest)}")
    parts += _describe_outlook(values, machine)
    return "".join(f" {part} |" for part in parts)


def _describe_layers(values: Mapping[str, float]) -> Iterator[str]:
    for name in SPREAD:
        names = [f"{name}_p{percent}" for percent in PERCENTILES]
        if names[0] in values:
            found = ", ".join(f"{values[each]:.2f}" for each in names)
            percents = "/".join(map(str, PERCENTILES))
            yield f"{name} over layers, percentiles {percents}: {found}"


def _describe_busiest(values: Mapping[str, float]) -> Iterator[str]:
    for place in range(1, BUSIEST + 1):
        if f"busiest_{place}_layer" in values:
            layer, expert, factor = (
                values[f"busiest_{place}_{each}"] for each in ("layer", "expert", "factor")
            )
            yield f"layer {layer:.0f} expert {expert:.0f} ({factor:.1f} x mean)"


def _describe_outlook(values: Mapping[str, float], machine: str) -> Iterator[str]:
    if "outlook_planned" not in values:
        return
    yield (
        f"if lent, predicted for {machine} from {values['outlook_planned']:.0f} layer forwards: "
        f"imbalance now {values['outlook_plain_imbalance']:.2f}"
    )
    for planner in PLANNERS:
        name = f"outlook_{planner}_"
        if name + "imbalance" not in values:
            continue
        text = (
            f"{planner}: imbalance {values[name + 'imbalance']:.2f}, "
            f"{values[name + 'lent_experts']:.1f} lent"
        )
        for part in ("layer", "step"):
            if f"{name}{part}_gain" in values:
                text += f", {part} {values[f'{name}{part}_gain']:+.1f}%"
        yield text
