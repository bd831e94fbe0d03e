"""Draw where lending pays: predicted speed-up over tokens, hidden size, ranks and bandwidth.

python tools/draw_crossover.py --output docs/crossover.svg
"""

import argparse
from pathlib import Path

from megatron_llep.offline.cli.crossover_picture import draw_crossover


def main() -> None:
    """Draw all panels."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="an .svg or .png file")
    args = parser.parse_args()
    draw_crossover(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
