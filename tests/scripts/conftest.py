"""What tests of command lines share."""

from collections.abc import Iterator

import pytest


@pytest.fixture
def unset_arguments() -> Iterator[None]:
    """Unset Megatron's global arguments, which reading a command line sets."""
    yield
    from megatron.training import global_vars  # Not before the CPU device is installed.

    global_vars.unset_global_variables()
