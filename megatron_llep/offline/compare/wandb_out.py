"""The comparison in wandb: each run again under Megatron's names, in one group, and the verdict.

A panel of the group then holds the curves of both runs over steps; every value also has the wall
time of training as `train-seconds`, to be chosen as the x axis.
"""

import importlib.util
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from megatron_llep.offline.compare.comparison import Comparison
from megatron_llep.offline.compare.run_log import RunLog
from megatron_llep.offline.compare.table import Row

SECONDS = "train-seconds"


def wandb_is_on() -> bool:
    """Whether wandb is installed and the user has not switched it off (WANDB_MODE=disabled)."""
    switched_off = os.environ.get("WANDB_MODE") == "disabled"
    return not switched_off and importlib.util.find_spec("wandb") is not None


def log_comparison(
    comparison: Comparison,
    rows: Sequence[Row],
    verdict: str,
    image: Path,
    *,
    project: str,
    group: str,
    folder: Path,
) -> None:
    """Write wandb runs: one of each side, one of the control, one with table and verdict.

    Offline unless WANDB_MODE says otherwise: `wandb sync` sends them.

    Args:
        comparison: what to log.
        rows: of the table.
        verdict: its sentence.
        image: the picture.
        project: of wandb.
        group: under which the runs are gathered.
        folder: where wandb makes its own folder.
    """
    import wandb

    def start(name: str, kind: str):
        return wandb.init(
            project=project,
            group=group,
            job_type=kind,
            name=name,
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )

    folder.mkdir(parents=True, exist_ok=True)
    for log in (comparison.reference, comparison.other, comparison.control):
        if log is None:
            continue
        with start(log.name, "side") as run:
            run.config["source"] = log.source
            for step, values in _by_step(log):
                run.log(values, step=step)
    with start("comparison", "comparison") as run:
        columns: list[str | int] = ["figure", *comparison.names, "together"]
        table = wandb.Table(columns=columns, data=[list(row) for row in rows])
        run.log({"comparison": table, "picture": wandb.Image(str(image))})
        run.summary.update({"agree": comparison.agree, "verdict": verdict})


def _by_step(log: RunLog) -> list[tuple[int, dict[str, float]]]:
    """Everything that was logged at a step, steps rising, as wandb demands."""
    steps: dict[int, dict[str, float]] = defaultdict(dict)
    for name, curve in log.curves.items():
        for step, value, seconds in zip(curve.steps, curve.values, curve.seconds, strict=True):
            steps[int(step)][name] = float(value)
            steps[int(step)][SECONDS] = float(seconds)
    return sorted(steps.items())
