"""Turn a model configuration (configs/*.yaml) into a torchrun command, print it and run it.

    python tools/launch.py configs/tiny.yaml -- --mock-data
    python tools/launch.py configs/tiny.yaml --no-llep -- --mock-data --train-iters 50
    python tools/launch.py configs/tiny.yaml --set --tensor-model-parallel-size=2 --dry-run
    python tools/launch.py configs/gpt-oss-120b.yaml --nnodes 8 --node-rank 3 \
        --rdzv-endpoint node0:29500 -- --data-path data/docs --save checkpoints

Flags come from the sections MODEL_ARGS, LAYOUT_ARGS and LLEP_ARGS, then from --set, then from what
follows `--`; of a flag given twice the later wins. Values read as in Megatron's own YAML files:
true gives a bare flag, false or null leaves the flag out, a list gives several values.
"""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

SECTIONS = ("MODEL_ARGS", "LAYOUT_ARGS", "LLEP_ARGS")
DEFAULT_SCRIPT = Path(__file__).resolve().parents[1] / "pretrain" / "pretrain_gpt.py"
MAX_PROCESSES_WITHOUT_GPU = 16
"""Most processes started unasked where no GPU is; --nproc asks for more."""

Flags = dict[str, object]
"""Flag with its leading dashes -> scalar, bool, None or list of values."""


def load_config(path: Path) -> dict[str, Flags]:
    """Read one YAML file.

    Returns:
        Section name -> flags, with every section of SECTIONS present.

    Raises:
        ValueError: no such file, not YAML, an unknown section, a key that is no flag, or a flag
            that two sections give.
    """
    if not path.is_file():
        raise ValueError(f"configuration {path}: no such file; see configs/ for those that exist")
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"configuration {path} is not valid YAML: {error}") from error
    if not isinstance(sections, dict) or "MODEL_ARGS" not in sections:
        raise ValueError(f"configuration {path} has no MODEL_ARGS section")
    seen: dict[str, str] = {}
    for name, flags in sections.items():
        if name not in SECTIONS:
            raise ValueError(
                f"configuration {path}: unknown section {name}; choose from {', '.join(SECTIONS)}"
            )
        if not isinstance(flags, dict):
            raise ValueError(f"configuration {path}: {name} must map flags to values")
        for flag in flags:
            if not str(flag).startswith("--"):
                raise ValueError(
                    f"configuration {path}: {name} has {flag!r}, which is no flag: write --{flag}"
                )
            if flag in seen:
                raise ValueError(
                    f"configuration {path}: {flag} is in {seen[flag]} and in {name}; keep one"
                )
            seen[flag] = name
    return {name: sections.get(name, {}) for name in SECTIONS}


def parse_override(text: str) -> Flags:
    """Read one --set value, FLAG or FLAG=VALUE, leading dashes optional, VALUE as in YAML.

    Raises:
        ValueError: there is no flag name, or the value is not YAML.
    """
    name, has_value, value = text.partition("=")
    name = name.lstrip("-")
    if not name:
        raise ValueError(f"--set {text}: give a flag, such as --set --train-iters=50")
    try:
        return {f"--{name}": yaml.safe_load(value) if has_value else True}
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text}: the value is not valid YAML") from error


def parse_extra(tokens: Sequence[str]) -> Flags:
    """Read what follows `--`: `--flag`, `--flag=value` or `--flag value value ...`.

    Raises:
        ValueError: the first token is no flag.
    """
    flags: Flags = {}
    values: list[str] = []
    for token in tokens:
        if token.startswith("--"):
            flag, has_value, value = token.partition("=")
            values = [value] if has_value else []
            flags[flag] = values
        elif not flags:
            raise ValueError(f"{token!r} after -- is no flag: write --flag value")
        else:
            values.append(token)
    return {flag: values or True for flag, values in flags.items()}


def format_flags(flags: Mapping[str, object]) -> list[str]:
    """Turn flags into command-line tokens, in the order of their first mention."""
    tokens: list[str] = []
    for flag, value in flags.items():
        if value is None or value is False:
            continue
        tokens.append(flag)
        if value is not True:
            tokens += [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return tokens


def layout_world_size(flags: Mapping[str, object]) -> int:
    """Smallest number of processes that the parallel layout in flags fills.

    Dense layers need a multiple of TP * CP * PP processes, expert layers of ETP * EP * PP.

    Raises:
        ValueError: a size is no positive integer.
    """
    tensor = _read_size(flags, "--tensor-model-parallel-size", 1)
    context = _read_size(flags, "--context-parallel-size", 1)
    pipeline = _read_size(flags, "--pipeline-model-parallel-size", 1)
    expert = _read_size(flags, "--expert-model-parallel-size", 1)
    expert_tensor = _read_size(flags, "--expert-tensor-parallel-size", tensor)
    return pipeline * math.lcm(tensor * context, expert_tensor * expert)


def _read_size(flags: Mapping[str, object], flag: str, default: int) -> int:
    value = flags.get(flag)
    if isinstance(value, list):
        value = value[-1]
    if value is None:
        return default
    if not str(value).isdigit() or int(str(value)) < 1:
        raise ValueError(f"{flag} {value}: give a number of ranks, 1 or more")
    return int(str(value))


def choose_nproc(flags: Mapping[str, object], nnodes: int, gpu_count: int) -> int:
    """Processes to start on this node when --nproc does not say.

    Raises:
        ValueError: the layout does not spread evenly over the nodes or is too large for them.
    """
    world = layout_world_size(flags)
    nproc, rest = divmod(world, nnodes)
    if rest:
        raise ValueError(
            f"--nnodes {nnodes}: the layout's {world} processes do not spread evenly; give --nproc"
        )
    limit = gpu_count or MAX_PROCESSES_WITHOUT_GPU
    if nproc > limit:
        what = f"{gpu_count} GPUs" if gpu_count else "no GPU"
        raise ValueError(
            f"the layout needs {world} processes, {nproc} on each of {nnodes} node(s), and this "
            f"one has {what}: use more nodes (--nnodes), a smaller layout "
            "(--set --expert-model-parallel-size=...), or give --nproc"
        )
    return nproc


def build_command(
    script: Path,
    flags: Mapping[str, object],
    nproc: int,
    nnodes: int = 1,
    node_rank: int | None = None,
    rdzv_endpoint: str | None = None,
) -> list[str]:
    """Assemble the torchrun command of this node.

    Raises:
        ValueError: several nodes without --node-rank and --rdzv-endpoint, or a rank out of range.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(nproc)]
    if nnodes == 1:
        command += ["--standalone", "--nnodes", "1"]
    else:
        if node_rank is None or rdzv_endpoint is None:
            raise ValueError(
                f"--nnodes {nnodes} needs --node-rank (0 to {nnodes - 1}, different on each node) "
                "and --rdzv-endpoint HOST:PORT (of node 0, the same on all)"
            )
        if not 0 <= node_rank < nnodes:
            raise ValueError(f"--node-rank {node_rank}: give 0 to {nnodes - 1}")
        command += ["--nnodes", str(nnodes), "--node-rank", str(node_rank)]
        command += ["--rdzv-backend", "static", "--rdzv-endpoint", rdzv_endpoint]
    return [*command, str(script), *format_flags(flags)]


def choose_environment(flags: Mapping[str, object], gpu_count: int) -> dict[str, str]:
    """Environment variables the run needs and the caller has not set.

    One thread a process where no GPU is; the single CUDA queue that Megatron asks of tensor and
    context parallelism on GPUs before Blackwell.
    """
    wanted = {}
    if gpu_count == 0:
        wanted["OMP_NUM_THREADS"] = "1"
    elif (
        _read_size(flags, "--tensor-model-parallel-size", 1) > 1
        or _read_size(flags, "--context-parallel-size", 1) > 1
    ):
        wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return {name: value for name, value in wanted.items() if name not in os.environ}


def count_gpus() -> int:
    """Count the GPUs that PyTorch sees on this node."""
    import torch  # here, so that --help and errors in the configuration stay fast

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def build_parser() -> argparse.ArgumentParser:
    """Command-line interface of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, help="YAML file, such as configs/tiny.yaml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FLAG[=VALUE]",
        help="override one Megatron flag, value as in YAML (=false removes it); may be repeated",
    )
    parser.add_argument("--no-llep", action="store_true", help="leave out LLEP_ARGS")
    parser.add_argument(
        "--nproc", type=int, help="processes on this node (default: what the layout needs)"
    )
    parser.add_argument("--nnodes", type=int, default=1, help="number of nodes (default: 1)")
    parser.add_argument("--node-rank", type=int, help="rank of this node, 0 to nnodes - 1")
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where the nodes meet")
    parser.add_argument(
        "--script", type=Path, default=DEFAULT_SCRIPT, help="default: pretrain/pretrain_gpt.py"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command, run nothing")
    return parser


def parse_command_line(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split argv into this script's options and the Megatron flags after `--`."""
    own, extra = list(argv), []
    if "--" in own:
        split = own.index("--")
        own, extra = own[:split], own[split + 1 :]
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
        if not args.script.is_file():
            raise ValueError(f"--script {args.script}: no such file")
        flags = collect_flags(args, extra)
        gpu_count = count_gpus()
        nproc = args.nproc or choose_nproc(flags, args.nnodes, gpu_count)
        command = build_command(
            args.script, flags, nproc, args.nnodes, args.node_rank, args.rdzv_endpoint
        )
        environment = choose_environment(flags, gpu_count)
    except ValueError as error:
        build_parser().error(str(error))
    assignments = [f"{name}={value}" for name, value in environment.items()]
    print(" ".join([*assignments, shlex.join(command)]), flush=True)
    if not args.dry_run:
        os.execve(command[0], command, {**os.environ, **environment})


if __name__ == "__main__":
    main()
