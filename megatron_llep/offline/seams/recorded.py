"""Signatures of what is called or overridden, as the versions that were checked have them."""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_llep.offline.seams.uses import Use

FILE = Path(__file__).with_name("recorded.json")

Recorded = dict[str, dict[str, str]]
"""{name: {signature: versions of Megatron}}"""


def load() -> Recorded:
    """What was written down; empty if nothing was."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def of_version(version: tuple[int, int]) -> dict[str, list[str]]:
    """The signatures by name, of a version or of the newest that is known.

    A name may have several, where methods of one name are imported under one.
    """
    known = load()
    versions = {
        each for of_name in known.values() for all_ in of_name.values() for each in all_.split()
    }
    wanted = ".".join(map(str, version))
    if versions and wanted not in versions:
        wanted = max(versions, key=lambda each: tuple(map(int, each.split("."))))
    return {
        name: [signature for signature, each in of_name.items() if wanted in each.split()]
        for name, of_name in known.items()
    }


def note(uses: Sequence[Use], version: str, known: Recorded) -> Recorded:
    """The signatures of one version, in the place of those that were known of it."""
    noted: dict[str, dict[str, set[str]]] = {}
    for name, signatures in known.items():
        for signature, versions in signatures.items():
            if others := {*versions.split()} - {version}:
                noted.setdefault(name, {})[signature] = others
    for use in uses:
        # Where all is given by name, the call itself says what has to be there.
        by_position = use.call is not None and use.call.positional > 0
        if use.signature is not None and (by_position or use.is_override):
            noted.setdefault(use.name, {}).setdefault(str(use.signature), set()).add(version)
    return {
        name: {signature: " ".join(sorted(versions)) for signature, versions in of_name.items()}
        for name, of_name in noted.items()
    }
