"""How long `view` takes and how large its page is, of a recording of 100,000 layer-steps.

    python benchmarks/view_time.py --folder recording

writes the recording there if it is not there yet, and the page beside it. It is synthetic: 48
layers, 128 experts of which some are hot and others become so, 8 ranks.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_llep.offline.machine import describe_machine
from megatron_llep.offline.recording import (
    RecordedLayer,
    Recording,
    RecordingInfo,
    RecordingWriter,
    is_recording,
)
from megatron_llep.offline.recording.layout import list_loans
from megatron_llep.offline.view.build import Options, build_view
from megatron_llep.offline.view.page import write_page
from megatron_llep.planner import make_plan
from megatron_llep.planner.cost.presets import PRESETS


def write_recording(
    folder: Path, *, rows: int, layers: int = 48, ranks: int = 8, experts: int = 128
) -> None:
    """Rows of a run whose popular experts change slowly; `tolerant` ran."""
    rng = np.random.default_rng(0)
    info = RecordingInfo(
        num_ranks=ranks,
        num_experts=experts,
        top_k=8,
        num_layers=layers,
        planner="tolerant",
        model={"hidden": 2048, "ffn_hidden": 768},
    )
    writer = RecordingWriter(folder, info, "all")
    popular = rng.normal(0, 1, (layers, experts))
    for number in range(rows):
        step, layer = divmod(number, layers)
        if layer == 0:
            popular = 0.99 * popular + 0.14 * rng.normal(0, 1, popular.shape)
        share = np.exp(popular[layer])
        # Much faster than drawing tokens one by one, and as uneven.
        counts = rng.poisson(4096 * 8 * share / share.sum(), (ranks, experts))
        lent = list_loans(make_plan(counts))
        writer.add(
            RecordedLayer(step=step, micro_batch=0, layer=layer, group=0, counts=counts, lent=lent)
        )
    writer.close()


def main() -> None:
    """Write, view, and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="of the recording; default: a temporary one")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--experts", type=int, default=128)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp()) / "recording"
    if not is_recording(folder):
        write_recording(folder, rows=args.rows, ranks=args.ranks, experts=args.experts)
    started, used = time.monotonic(), time.process_time()
    recording = Recording.open(folder)
    view = build_view(recording, Options(cost=PRESETS["h200"]))
    size = write_page(folder.parent / "view.html", view)
    print(describe_machine())
    print(
        f"{recording.num_rows:,} layer-steps: {time.monotonic() - started:.1f} s "
        f"({time.process_time() - used:.1f} s of CPU), page {size / 1e6:.2f} MB, most memory "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    )


if __name__ == "__main__":
    main()
