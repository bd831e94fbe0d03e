"""A module computes with other attributes than its own, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Give an object attributes for a while; what it had before comes back, whatever happens.

    A plain attribute hides a parameter or a submodule of that name: `torch.nn.Module` looks for
    those last. So the module's state dict and parameters know nothing of it.
    """
    own = vars(owner)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            del own[name]
        own.update(before)
