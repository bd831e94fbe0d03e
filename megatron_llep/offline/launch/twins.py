"""Plain expert parallelism, LLEP and a control as training commands, from one configuration.

What the controls change, and so what they measure:

order   The micro-batch size is halved (or doubled, where it is odd) at the same global batch size:
        the same samples and the same sums in another order, so what is left is rounding and what
        training makes of it. That holds without dropout, auxiliary losses, capacity factors and
        FP8, all of which see micro-batches; with them it is refused.
        Megatron draws random numbers for every element of a micro-batch before it draws some of
        the initial weights (the routers'). So all runs start from the same weights, saved by a
        first short run that takes one step at learning rate 0, unless they load weights anyway.
seed    Another --seed: other initial weights, unless they are loaded, and another order of the
        data. What is left is how far two equally good trainings are apart, which is much more.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_llep.offline.launch.execute import Run
from megatron_llep.offline.launch.flags import Flags, format_flags, load_config, read_value
from megatron_llep.offline.launch.torchrun import choose_nproc

CONTROLS = ("order", "seed", "none")
KINDS = {"plain": "plain EP", "llep": "LLEP", "control": "control"}
OWN_FLAGS = ("--tensorboard-dir", "--save", "--wandb-exp-name", "--wandb-save-dir")
WEIGHTS = ("--load", "--pretrained-checkpoint", "--hf-load")
# Flag -> Megatron's default and what makes the result depend on how samples are put together.
_PER_MICRO_BATCH: Mapping[str, tuple[object, str]] = {
    "--hidden-dropout": (0.1, "dropout draws other masks"),
    "--attention-dropout": (0.1, "dropout draws other masks"),
    "--moe-aux-loss-coeff": (0.0, "the auxiliary loss is one of each micro-batch"),
    "--moe-input-jitter-eps": (None, "jitter draws other numbers"),
    "--moe-expert-capacity-factor": (None, "which tokens are dropped depends on the micro-batch"),
    "--fp8-format": (None, "FP8 scales depend on the micro-batch"),
    "--fp4-format": (None, "FP4 scales depend on the micro-batch"),
}


def plan_twins(
    config: Path,
    extra: Flags,
    out: Path,
    *,
    launcher: Path,
    script: Path | None = None,
    control: str = "order",
    nproc: int | None = None,
    gpu_count: int = 0,
    wandb_project: str | None = None,
    save: bool = False,
) -> list[Run]:
    """The training commands in the order in which they run; kinds init, plain, llep, control.

    Args:
        config: a YAML file as in `configs/`.
        extra: Megatron's flags beyond it, for all runs; --moe-llep-* for the LLEP run.
        out: folder for the runs' logs.
        launcher: tools/launch.py.
        script: what it starts; default: what the launcher chooses for the configuration.
        control: one of CONTROLS.
        nproc: processes; default: what the layout needs.
        gpu_count: of this machine.
        wandb_project: under which the runs log, None for not at all.
        save: whether each leaves its weights, in the folder that `checkpoint_of` names.

    Raises:
        ValueError: unusable flags; names the flag and the way out.
    """
    for flag in OWN_FLAGS:
        if flag in extra:
            raise ValueError(f"{flag}: each run gets a folder of its own under --out; leave it out")
    sections = load_config(config)
    llep_extra = {name: value for name, value in extra.items() if name.startswith("--moe-llep")}
    shared = {name: value for name, value in extra.items() if name not in llep_extra}
    flags = sections["MODEL_ARGS"] | sections["LAYOUT_ARGS"] | shared
    steps = _read_number(flags, "--train-iters")
    ranks = nproc or choose_nproc(flags, 1, gpu_count)
    shared["--log-timers-to-tensorboard"] = True
    if "--log-interval" not in flags:
        shared["--log-interval"] = 1
    changed: Flags = {}
    if control == "seed":
        changed = {"--seed": int(str(read_value(flags, "--seed", 1234))) + 1}
    elif control == "order":
        changed = _other_order(flags, ranks)
        shared["--global-batch-size"] = changed["--global-batch-size"]

    if not sections["LLEP_ARGS"].get("--moe-llep"):
        llep_extra["--moe-llep"] = True
    runs: list[Run] = []

    def add(kind: str, title: str, own: Flags, steps: int) -> None:
        if save or kind == "init":
            own = own | {"--save": checkpoint_of(out, kind), "--save-interval": steps}
            own |= {"--no-save-optim": True, "--no-save-rng": True}
        if wandb_project and kind != "init":
            own = own | {"--wandb-project": wandb_project, "--wandb-exp-name": kind}
            own |= {"--wandb-save-dir": out / kind}
        runs.append(
            make_run(
                kind,
                title,
                shared | own,
                config=config,
                launcher=launcher,
                script=script,
                out=out,
                nproc=ranks,
                steps=steps,
            )
        )

    start: Flags = {}
    if control == "order" and not any(flag in flags for flag in WEIGHTS):
        still: Flags = {"--lr": 0, "--min-lr": 0, "--exit-interval": 1, "--eval-interval": 1000}
        add("init", "initial weights", still, 1)
        start = {"--pretrained-checkpoint": checkpoint_of(out, "init"), "--finetune": True}
    add("plain", KINDS["plain"], start, steps)
    add("llep", KINDS["llep"], start | llep_extra, steps)
    if control != "none":
        what = {"order": "other order of sums", "seed": "other seed"}[control]
        add("control", f"plain EP, {what}", start | changed, steps)
    return runs


def make_run(
    kind: str,
    title: str,
    flags: Flags,
    *,
    config: Path,
    launcher: Path,
    out: Path,
    nproc: int,
    steps: int,
    first_step: int = 1,
    phase: str = "",
    script: Path | None = None,
) -> Run:
    """One training command, without LLEP unless its kind is llep.

    It logs to `out`: its console to `logs`, TensorBoard to a folder of its kind and, if the run is
    one of several phases, of its phase.
    """
    label = f"{kind}-{phase}" if phase else ""
    tensorboard = out / kind / "tensorboard" / label
    command = [sys.executable, str(launcher), str(config)]
    command += [] if kind == "llep" else ["--no-llep"]
    command += ["--script", str(script)] if script else []
    command += ["--nproc", str(nproc), "--"]
    return Run(
        kind=kind,
        title=title,
        command=command + format_flags(flags | {"--tensorboard-dir": tensorboard}),
        ranks=nproc,
        log=out / "logs" / f"{label or kind}.log",
        tensorboard=tensorboard,
        steps=steps,
        first_step=first_step,
    )


def checkpoint_of(out: Path, kind: str) -> Path:
    """Where the run of that kind saves its weights, if it does."""
    return out / kind / "checkpoint"


def _other_order(flags: Flags, nproc: int) -> Flags:
    """Another micro-batch size at the same global batch size.

    Raises:
        ValueError: that would be other mathematics, or there is no such size.
    """
    for flag, (default, reason) in _PER_MICRO_BATCH.items():
        value = read_value(flags, flag, default)
        if value not in (None, False) and _float_or_one(value) != 0:
            raise ValueError(
                f"{flag} {value}: {reason}, so another micro-batch size is no control; give "
                f"{flag} 0, or --control seed"
            )
    micro = _read_number(flags, "--micro-batch-size")
    ranks = 1
    for flag in ("tensor-model", "pipeline-model", "context"):
        ranks *= int(str(read_value(flags, f"--{flag}-parallel-size", 1)))
    replicas = max(1, nproc // ranks)
    total = int(str(read_value(flags, "--global-batch-size", micro * replicas)))
    if micro % 2 == 0:
        other = micro // 2
    elif total % (2 * micro * replicas) == 0:
        other = 2 * micro
    else:
        raise ValueError(
            f"--micro-batch-size {micro} with --global-batch-size {total}: neither half nor twice "
            "of it fits, so there is no other order of sums; change one, or give --control seed"
        )
    return {"--micro-batch-size": other, "--global-batch-size": total}


def _float_or_one(value: object) -> float:
    """The number, or 1 for what is none."""
    try:
        return float(str(value))
    except ValueError:
        return 1.0


def _read_number(flags: Flags, flag: str) -> int:
    """A whole number that must be given.

    Raises:
        ValueError: it is missing or is none.
    """
    value = read_value(flags, flag)
    if not str(value).isdigit() or int(str(value)) < 1:
        raise ValueError(f"{flag} {value}: give a whole number, in the configuration or after --")
    return int(str(value))
