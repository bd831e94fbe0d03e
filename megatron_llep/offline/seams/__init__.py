"""Where LLEP joins Megatron, read from both sources: what is missing, what has changed.

Nothing of Megatron is imported, so any tree can be checked, also one that cannot run here.
"""

from megatron_llep.offline.seams.check import Change, check, count_seams, read_version, record

__all__ = ["Change", "check", "count_seams", "read_version", "record"]
