"""What the commands' pictures and progress bars share; matplotlib and tqdm are optional."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def import_pyplot() -> Any:
    """matplotlib.pyplot without a display.

    Raises:
        ImportError: it is missing; says how to get it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'megatron-llep[plot]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "megatron_llep", "hatch.linewidth": 0.6})
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, output: Path) -> None:
    """Write a figure, the same bytes every time, and close it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None, dpi=120)
    import_pyplot().close(figure)


def start_progress(total: int, what: str) -> Callable[[], None]:
    """A progress bar on stderr; call what this returns once for each of `total` parts."""
    try:
        from tqdm import tqdm
    except ImportError:
        return lambda: None
    # Nothing is shown of what is done within a second, or where nobody watches.
    bar = tqdm(total=total, desc=what, delay=1.0, leave=False, disable=None)
    return lambda: bar.update() and None
