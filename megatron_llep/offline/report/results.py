"""Results as JSON, with the machine that they are of."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_llep.offline.machine import describe_machine


def write_results(path: Path, results: Mapping[str, Any], *, machine: object = None) -> None:
    """Write a JSON file.

    Args:
        path: its folder is made.
        results: numbers, texts, lists, tuples and mappings; what is not finite becomes text.
        machine: what the results are of; default: the one at hand.
    """
    record = {"machine": describe_machine() if machine is None else machine, **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """The same with numbers that JSON does not know as text."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
