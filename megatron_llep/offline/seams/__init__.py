"""Where LLEP joins Megatron, read from both sources: what is missing, what has changed.

Nothing of Megatron is imported, so any tree can be checked, also one that cannot run here.
"""

from megatron_llep.offline.seams.check import Change, Report, check, note, read_version, record

__all__ = ["Change", "Report", "check", "note", "read_version", "record"]
