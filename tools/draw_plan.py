"""Draw what a plan does to the ranks' loads: the README's picture, from a real plan.

python tools/draw_plan.py --output docs/plan.svg
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from megatron_llep.planner import PLANNERS, Plan, make_plan

RANKS, EXPERTS = 4, 16


def make_skewed_counts(tokens: int, sigma: float, seed: int) -> np.ndarray:
    """Tokens [P, E] of a router with log-normal popularity of its experts."""
    generator = np.random.default_rng(seed)
    popularity = generator.lognormal(sigma=sigma, size=EXPERTS)
    return generator.multinomial(tokens, popularity / popularity.sum(), size=RANKS)


def draw_loads(axes: Axes, quota: np.ndarray, title: str) -> None:
    """Stack each rank's tokens by expert; experts of one home share a colour, lent ones a hatch."""
    homes = np.arange(EXPERTS) // (EXPERTS // RANKS)
    bottom = np.zeros(RANKS)
    for expert in np.argsort(homes, kind="stable"):
        color = plt.get_cmap("tab10")(homes[expert])
        for rank in np.flatnonzero(quota[expert]):
            axes.bar(
                rank,
                quota[expert, rank],
                bottom=bottom[rank],
                color=color,
                edgecolor="white",
                linewidth=0.8,
                hatch="///" if homes[expert] != rank else None,
            )
            bottom[rank] += quota[expert, rank]
    mean = quota.sum() / RANKS
    axes.axhline(mean, color="black", linewidth=0.8, linestyle="--")
    axes.set_title(title, fontsize=10)
    axes.set_xticks(range(RANKS), [f"rank {rank}" for rank in range(RANKS)])
    axes.spines[["top", "right"]].set_visible(False)


def draw_plan(plan: Plan, output: Path) -> None:
    """Draw loads before and after side by side; the format follows the file's suffix."""
    homes = np.arange(EXPERTS) // plan.experts_per_rank
    plain = np.zeros_like(plan.quota)
    plain[np.arange(EXPERTS), homes] = plan.quota.sum(axis=1)
    matplotlib.rcParams.update({"svg.hashsalt": "megatron_llep", "hatch.linewidth": 0.6})
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    draw_loads(left, plain, f"expert parallelism: busiest rank {plan.imbalance_before:.2f} x mean")
    draw_loads(
        right,
        plan.quota,
        f"LLEP: {plan.imbalance_after:.2f} x mean, {len(plan.transfers)} experts lent (hatched)",
    )
    left.set_ylabel("tokens computed")
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


def main() -> None:
    """Make a plan for a skewed routing and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="an .svg or .png file")
    parser.add_argument("--planner", choices=PLANNERS, default="exact")
    parser.add_argument("--sigma", type=float, default=1.5, help="skew of the experts' popularity")
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    counts = make_skewed_counts(4096, args.sigma, args.seed)
    plan = make_plan(counts, planner=args.planner, min_tokens_per_gemm=1)
    draw_plan(plan, args.output)
    print(f"{args.output}: {plan.imbalance_before:.2f} -> {plan.imbalance_after:.2f} x mean")


if __name__ == "__main__":
    main()
