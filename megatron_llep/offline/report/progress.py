"""A progress bar; tqdm is optional."""

from collections.abc import Callable


def start_progress(total: int, what: str) -> Callable[[], None]:
    """A progress bar on stderr; call what this returns once for each of `total` parts."""
    try:
        from tqdm import tqdm
    except ImportError:
        return lambda: None
    # Nothing is shown of what is done within a second, or where nobody watches.
    bar = tqdm(total=total, desc=what, delay=1.0, leave=False, disable=None)
    return lambda: bar.update() and None
