"""Turn a model configuration (configs/*.yaml) into a torchrun command, print it and run it.

    python tools/launch.py configs/tiny.yaml -- --mock-data
    python tools/launch.py configs/tiny.yaml --no-llep -- --mock-data --train-iters 50
    python tools/launch.py configs/tiny.yaml --set --tensor-model-parallel-size=2 --dry-run
    python tools/launch.py configs/sft-demo.yaml -- --data-path data/chat.jsonl
    python tools/launch.py configs/gpt-oss-120b.yaml --nnodes 8 --node-rank 3 \
        --rdzv-endpoint node0:29500 -- --data-path data/docs --save checkpoints

Flags come from the sections MODEL_ARGS, LAYOUT_ARGS and LLEP_ARGS, first those of the file named as
BASE if there is one, then from --set, then from what follows `--`; of a flag given twice the later
wins. SCRIPT names the training script. Values read as in Megatron's own YAML files:
true gives a bare flag, false or null leaves the flag out, a list gives several values.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_llep.offline.launch.flags import (
    Flags,
    find_script,
    load_config,
    parse_extra,
    parse_override,
    split_extra,
)
from megatron_llep.offline.launch.torchrun import (
    build_command,
    choose_environment,
    choose_nproc,
    count_gpus,
)

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_SCRIPT = "pretrain/pretrain_gpt.py"


def build_parser() -> argparse.ArgumentParser:
    """Command-line interface of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("config", type=Path, help="YAML file, such as configs/tiny.yaml")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FLAG[=VALUE]",
        help="override one Megatron flag, value as in YAML (=false removes it); may be repeated",
    )
    add("--no-llep", action="store_true", help="leave out LLEP_ARGS")
    add("--nproc", type=int, help="processes on this node (default: what the layout needs)")
    add("--nnodes", type=int, default=1, help="number of nodes (default: 1)")
    add("--node-rank", type=int, help="rank of this node, 0 to nnodes - 1")
    add("--rdzv-endpoint", metavar="HOST:PORT", help="where the nodes meet")
    add("--script", type=Path, help=f"default: the configuration's SCRIPT, else {DEFAULT_SCRIPT}")
    add("--dry-run", action="store_true", help="print the command, run nothing")
    return parser


def parse_command_line(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split argv into this script's options and the Megatron flags after `--`."""
    own, extra = split_extra(argv)
    # argparse refuses a value that begins with dashes unless it is joined to its option.
    joined: list[str] = []
    for token in own:
        if joined and joined[-1] == "--set":
            joined[-1] = f"--set={token}"
        else:
            joined.append(token)
    return build_parser().parse_args(joined), extra


def collect_flags(args: argparse.Namespace, extra: Sequence[str]) -> Flags:
    """Merge the configuration, --set and the extra flags; the later wins.

    Raises:
        ValueError: unusable input, or LLEP is both refused and asked for.
    """
    sections = load_config(args.config)
    if args.no_llep:
        sections["LLEP_ARGS"] = {}
    flags: Flags = {}
    overrides = [parse_override(text) for text in args.set] + [parse_extra(extra)]
    for part in [*sections.values(), *overrides]:
        flags.update(part)
    if args.no_llep and flags.get("--moe-llep"):
        raise ValueError("--no-llep and --moe-llep exclude each other: drop one")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Print the command, then become it."""
    args, extra = parse_command_line(sys.argv[1:] if argv is None else argv)
    try:
        for option, value in (("--nnodes", args.nnodes), ("--nproc", args.nproc)):
            if value is not None and value < 1:
                raise ValueError(f"{option} {value}: give 1 or more")
        flags = collect_flags(args, extra)
        script = args.script or ROOT / (find_script(args.config) or DEFAULT_SCRIPT)
        if not script.is_file():
            raise ValueError(f"--script {script}: no such file")
        gpu_count = count_gpus()
        nproc = args.nproc or choose_nproc(flags, args.nnodes, gpu_count)
        command = build_command(
            script, flags, nproc, args.nnodes, args.node_rank, args.rdzv_endpoint
        )
        environment = choose_environment(flags, gpu_count)
    except ValueError as error:
        build_parser().error(str(error))
    assignments = [f"{name}={value}" for name, value in environment.items()]
    # One write: nodes share a log, and print() writes the newline by itself where nothing buffers.
    sys.stdout.write(" ".join([*assignments, shlex.join(command)]) + "\n")
    sys.stdout.flush()
    if not args.dry_run:
        os.execve(command[0], command, {**os.environ, **environment})


if __name__ == "__main__":
    main()
