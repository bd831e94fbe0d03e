"""What differs between the versions of Megatron that LLEP runs on; no other room asks for one.

Conditions are written `if MEGATRON >= (0, 19)`, and nothing else: `tools/check_seams.py` reads them
too, to know which names a version needs.
"""

from argparse import Namespace
from typing import Any

from megatron.core.package_info import MAJOR, MINOR

MEGATRON = (MAJOR, MINOR)


def read_flag(args: Namespace, name: str) -> Any:
    """A flag's value; None where this version of Megatron does not have the flag."""
    return getattr(args, name) if MEGATRON >= (0, 19) else getattr(args, name, None)


def weight_shards(linear: Any) -> int:
    """Over how many ranks a linear's weight is spread, to be gathered for each use."""
    return linear.gtp_remat_size if MEGATRON >= (0, 19) else 1
