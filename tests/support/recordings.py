"""What a recording holds, by micro-batch."""

from itertools import groupby

from megatron_llep.offline.recording import RecordedLayer, Recording


def read_batches(recording: Recording) -> list[list[RecordedLayer]]:
    """The layers of each micro-batch of each group, by step, micro-batch, group, then layer."""

    def place(row: RecordedLayer) -> tuple[int, ...]:
        return row.step, row.micro_batch, row.group, row.layer

    rows = sorted(recording.read(), key=place)
    return [list(batch) for _, batch in groupby(rows, lambda row: place(row)[:3])]
