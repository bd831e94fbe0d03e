"""Print predictions beside the LLEP paper's curves, or put them into docs/tuning.md.

    python tools/paper_curves.py            # print
    python tools/paper_curves.py --write    # write between the markers of docs/tuning.md

Seconds, no GPU. What is predicted and fitted: `megatron_llep/offline/paper/`.
"""

import argparse
from pathlib import Path

from megatron_llep.offline.paper.comparison import compare
from megatron_llep.offline.paper.page import make_section, replace_section
from megatron_llep.planner.cost.presets import PRESETS, get_cost_model

PAGE = Path(__file__).parents[1] / "docs" / "tuning.md"
MACHINE = "h200"
"""What the paper measured on."""


def main(arguments: list[str] | None = None) -> None:
    """Print the section, or write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--machine",
        default=MACHINE,
        help=f"of {', '.join(PRESETS)}, or a file that calibrate wrote; default: %(default)s",
    )
    parser.add_argument(
        "--write",
        type=Path,
        nargs="?",
        const=PAGE,
        metavar="PAGE",
        help="put them between a page's markers; default: docs/tuning.md",
    )
    args = parser.parse_args(arguments)
    if args.write == PAGE and args.machine != MACHINE:
        parser.error(f"--machine {args.machine}: {PAGE.name} is about {MACHINE}; name another PAGE")
    section = make_section(compare(get_cost_model(args.machine)))
    if args.write is None:
        print(section, end="")
        return
    args.write.write_text(replace_section(args.write.read_text(), section))
    print(args.write)


if __name__ == "__main__":
    main()
