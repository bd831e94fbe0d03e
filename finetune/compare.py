"""Do two trainings converge alike, and which is there sooner?

    python finetune/compare.py runs/plain runs/llep --control runs/plain-other-order
    python finetune/compare.py runs/plain runs/llep --target "lm loss=1.2" --target accuracy=0.9
    python finetune/compare.py --config configs/sft-demo.yaml --out runs/sft -- \
        --data-path data/arithmetic.jsonl --train-iters 60

The first two read what runs logged: TensorBoard folders or wandb runs, offline or synced. The last
starts plain expert parallelism, LLEP and a control from one configuration, one after another:
--control order is plain with another micro-batch size at the same global batch size, which is the
same sums in another order; --control seed is plain with another seed; --control none.

Prints a table and a verdict, and writes compare.json, compare.png and compare.html to --out and,
with --wandb-project, wandb runs in one group (offline, unless WANDB_MODE says otherwise).

Exit code: 0 if the runs agree, 1 if they differ or a run fails, 2 for unusable options.
"""

import sys
from pathlib import Path

from megatron_llep.offline.compare.command import main
from megatron_llep.offline.launch.execute import end_on_sigterm

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main(sys.argv[1:], description=__doc__, launcher=ROOT / "tools" / "launch.py"))
