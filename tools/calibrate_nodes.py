"""Calibrate over two nodes with a slow link between them: how well is such a link measured?

    python tools/calibrate_nodes.py --rate 1gbit -- --quick

Two network namespaces of this machine are the nodes; flags after `--` are for `calibrate`. As root,
on Linux, with iproute2; elsewhere it says so, and ends with 3.
"""

import argparse
import signal
import sys
from pathlib import Path

from node_bed.bed import NoNamespacesError, join_two_nodes
from node_bed.launch import run_on

from megatron_llep.offline.launch.flags import split_extra


def build_parser() -> argparse.ArgumentParser:
    """Command-line interface."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", default="1gbit", help="of the link, each way, as tc reads it")
    parser.add_argument("--ranks-per-node", type=int, default=1, help="(default: 1)")
    parser.add_argument("--limit", type=float, default=900, help="seconds at most")
    parser.add_argument("--output", type=Path, default=Path("cost_model.json"))
    return parser


def main() -> int:
    """Calibrate, and say what it said."""
    own, extra = split_extra(sys.argv[1:])
    args = build_parser().parse_args(own)
    # So that the nodes are taken down then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    command = ["-m", "megatron_llep", "calibrate", "--output", str(args.output.resolve())]
    # Both nodes have this machine's name: they must be told.
    command += ["--ranks-per-node", str(args.ranks_per_node), *extra]
    try:
        with join_two_nodes(args.rate) as nodes:
            statuses, said = run_on(
                nodes,
                command,
                ranks_per_node=args.ranks_per_node,
                port=29400,
                limit=args.limit,
            )
    except NoNamespacesError as error:
        print(f"calibrate_nodes: {error}", file=sys.stderr)
        return 3
    print(said[0] if not any(statuses) else "".join(said))
    return max(map(abs, statuses))


if __name__ == "__main__":
    sys.exit(main())
