"""Recording of a training's routing: `--moe-llep-record`.

One rank of each group that shares tokens writes, for the layers of its pipeline stage. Rows go to
a thread (`offline.recording.write`); training waits for it only where the disk is slower for long.

A recording must not end a training. What can be seen at start-up is refused there, by all ranks
together. A disk that fails later, or hangs, is told once, on the rank that writes, whose recording
ends there, while the training goes on. Other ranks notice nothing, as none waits for another here.

Shape letters: P ranks that share tokens, tp sources a rank, E experts.
"""

import atexit
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.config import LLEPConfig
from megatron_llep.lending.groups import gather_objects
from megatron_llep.metrics import install_tracker
from megatron_llep.observe.clock import StepClock
from megatron_llep.observe.recording_info import make_info
from megatron_llep.observe.seen import SeenLayer
from megatron_llep.planner import Plan
from megatron_llep.validation import refuse_on_all_ranks

if TYPE_CHECKING:
    from megatron_llep.offline.recording import RecordingInfo, RecordingWriter


class Recorder:
    """Adds what layers of this rank route to a folder; one for each folder in a process."""

    def __init__(self, folder: str, clock: StepClock):
        self._folder = folder
        self.clock = clock
        self._writer: RecordingWriter | None = None
        self._info: RecordingInfo | None = None
        self._group = 0
        self._has_failed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recorder":
        """Itself: a copied layer is recorded in the same folder, and a thread has no copy."""
        return self

    def open(self, info: "RecordingInfo", groups: ProcessGroupCollection) -> None:
        """Get ready for rows; each layer may call it, the first one opens.

        Args:
            info: of the run.
            groups: of the layer, as they are without LLEP; of their ranks this one is to write.

        Raises:
            ValueError: the folder cannot be written to, or is of another run; or another model of
                this process is recorded in it.
        """
        from megatron_llep.offline.recording import RecordingWriter

        if self._info is not None and info.sizes != self._info.sizes:
            raise ValueError(
                f"--moe-llep-record {self._folder}: another model of this process is recorded "
                "there; give each a folder of its own"
            )
        if self._writer is None and not self._has_failed:
            self._writer = RecordingWriter(self._folder, info, f"rank{dist.get_rank()}")
            atexit.register(self.close)
        joined = info.num_ranks > groups.ep.size()  # over replicas: all are one group
        self._info, self._group = info, 0 if joined else groups.expt_dp.rank()

    def listen(self) -> None:
        """Add also what is observed beside plain expert parallelism, as it is reported."""
        listeners = install_tracker().on_seen
        if self.add_seen not in listeners:
            listeners.append(self.add_seen)

    def add_seen(self, seen: SeenLayer) -> None:
        """As `add`; of many micro-batches observation drops some, so they are counted anew."""
        self.add(seen.layer, seen.counts, seen.plan)

    def add(self, layer: int, counts: np.ndarray, plan: Plan | None) -> None:
        """Record one layer of one micro-batch. Never raises: see above.

        Args:
            layer: of the whole model, from 0; multi-token prediction last.
            counts: int [P * tp, E], (token, expert) pairs of each source, by rank.
            plan: what ran; None where nothing was planned.
        """
        from megatron_llep.offline.recording.layout import RecordedLayer, list_loans

        step, micro_batch = self.clock.tick(layer)
        if self._writer is None:
            return
        assert self._info is not None
        P, E = self._info.num_ranks, self._info.num_experts
        row = RecordedLayer(
            step=step,
            micro_batch=micro_batch,
            layer=layer,
            group=self._group,
            counts=counts.reshape(P, -1, E).sum(axis=1),
            lent=np.zeros((0, 3), np.int64) if plan is None else list_loans(plan),
        )
        try:
            self._writer.add(row)
        except RuntimeError as error:
            self._fail(error)

    def flush(self) -> None:
        """Wait until what was added is on disk."""
        if self._writer is not None:
            try:
                self._writer.flush()
            except RuntimeError as error:
                self._fail(error)

    def close(self) -> None:
        """Write what is left; also done at the end of the process."""
        atexit.unregister(self.close)
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except RuntimeError as error:
                self._fail(error)

    def _fail(self, error: RuntimeError) -> None:
        self._writer, self._has_failed = None, True
        atexit.unregister(self.close)
        print(f"megatron_llep: the recording ends here, training goes on: {error}", file=sys.stderr)


def prepare_recorder(
    llep: LLEPConfig, layers: Sequence[tuple[ProcessGroupCollection, TransformerConfig | None]]
) -> Recorder | None:
    """Check that every rank that is to write can; all ranks of the job call it.

    Args:
        llep: the same on all ranks.
        layers: groups of this rank's MoE layers, with their model's configuration if it is known;
            nothing where it has none.

    Returns:
        This rank's recorder, to be opened by ranks that write; None without `--moe-llep-record`.

    Raises:
        ValueError: on all ranks; some rank cannot write there, lacks pyarrow, or the folder is of
            another run.
    """
    if llep.record is None:
        return None
    refusal, last_step = None, -1
    for groups, config in layers:
        if groups.tp_ep.rank() == 0:
            try:
                last_step = max(last_step, _check_folder(llep, groups, config))
            except ValueError as error:
                refusal = str(error)
    refuse_on_all_ranks(refusal)
    # Where steps are counted, a run that is resumed goes on with the next.
    first_step = 1 + max(gather_objects(last_step))
    tracker = install_tracker()
    recorder = tracker.recorders.get(llep.record)
    if recorder is None:
        clock = StepClock(lambda: tracker.times_reported, first_step)
        recorder = tracker.recorders[llep.record] = Recorder(llep.record, clock)
    else:
        recorder.clock.restart()
    return recorder


def _check_folder(
    llep: LLEPConfig, groups: ProcessGroupCollection, config: TransformerConfig | None
) -> int:
    """The last step that a folder has, -1 for none.

    Raises:
        ValueError: this rank cannot record there.
    """
    assert llep.record is not None
    try:
        from megatron_llep.offline.recording.folder import check_writable, find_last_step
    except ImportError as error:
        raise ValueError(
            f"--moe-llep-record {llep.record}: needs pyarrow ({error}); pip install "
            "'megatron-llep[record]', or leave the flag out"
        ) from error
    folder = Path(llep.record)
    check_writable(folder)
    return find_last_step(folder, None if config is None else make_info(config, llep, groups))
