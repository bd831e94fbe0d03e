"""Check a tree of Megatron against what LLEP uses of it, by its source alone.

    python tools/check_seams.py PATH_TO_MEGATRON

PATH holds `megatron/core`: a checkout of Megatron-LM, or site-packages. Of every name that is
missing, and every signature that is not as recorded, it says where, what was expected, and who uses
it; exit status 1 if there is any. `--write` records the tree's signatures as tested.
"""

import argparse
import sys
from pathlib import Path

from megatron_llep.offline.seams import check, record

ROOT = Path(__file__).parents[1]
ALSO = [ROOT / folder for folder in ("benchmarks", "finetune", "pretrain", "tools")]


def main(arguments: list[str] | None = None) -> int:
    """Print what is missing or changed; 1 if anything is, 2 if there is no Megatron."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, metavar="PATH", help="a folder with megatron/core")
    parser.add_argument("--write", action="store_true", help="record the tree's signatures")
    args = parser.parse_args(arguments)
    try:
        if args.write:
            record(args.folder, also=ALSO)
        report = check(args.folder, also=ALSO)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for change in report.changes:
        print(change, end="\n\n")
    changed = len({change.name for change in report.changes})
    print(f"{changed} of {report.num_names} names of Megatron are missing or changed")
    return 1 if report.changes else 0


if __name__ == "__main__":
    sys.exit(main())
