"""A run's routing on disk: counts by layer, micro-batch, rank and expert, with what was planned.

A folder of Parquet files, each complete in itself: a run that is killed loses what it had not yet
written, never what it had. `write` appends, `read` goes through a folder piece by piece.
"""

from megatron_llep.offline.recording.layout import RecordedLayer, RecordingInfo
from megatron_llep.offline.recording.read import Recording, is_recording
from megatron_llep.offline.recording.write import RecordingWriter

__all__ = ["RecordedLayer", "Recording", "RecordingInfo", "RecordingWriter", "is_recording"]
