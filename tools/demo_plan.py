"""What the demo runs: layout, device, corpora and the four training commands."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_llep.offline.launch.execute import Run
from megatron_llep.offline.launch.flags import Flags, format_flags, load_config
from megatron_llep.offline.launch.torchrun import layout_world_size

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "demo.yaml"
WANDB_PROJECT = "megatron-llep-demo"
# Domain -> what tools/prepare_corpus.py makes it of.
DOMAINS = {
    "docs": ["--builtin", "python-docs"],
    "code": ["--builtin", "python-stdlib", "--max-bytes", "4000000"],
}
SECOND_DOMAIN = "code"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the parallel dimensions, in ranks."""

    tp: int = 1
    pp: int = 1
    ep: int = 2
    etp: int = 1

    def flags(self) -> Flags:
        """As Megatron's flags."""
        return {
            "--tensor-model-parallel-size": self.tp,
            "--pipeline-model-parallel-size": self.pp,
            "--expert-model-parallel-size": self.ep,
            "--expert-tensor-parallel-size": self.etp,
            "--sequence-parallel": self.tp > 1,  # Megatron's MoE layers demand it
        }

    def world_size(self) -> int:
        """Processes that the layout fills."""
        return layout_world_size(self.flags())

    def data_parallel_size(self) -> int:
        """Replicas of the dense layers."""
        return self.world_size() // (self.tp * self.pp)

    def __str__(self) -> str:
        return f"TP={self.tp} PP={self.pp} EP={self.ep} ETP={self.etp}"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of the training: `steps` from where the phase before it ended."""

    name: str
    domains: tuple[str, ...]
    first_step: int
    steps: int

    @property
    def last_step(self) -> int:
        """Counted from 1 over both phases."""
        return self.first_step + self.steps - 1


def check_layout(layout: Layout, overrides: Flags) -> Flags:
    """Check the layout against the demo's model, before anything runs.

    Args:
        layout: what was asked for.
        overrides: Megatron flags that replace the configuration's.

    Returns:
        All flags of the plain run.

    Raises:
        ValueError: names the option, its value and the way out.
    """
    sections = load_config(CONFIG)
    flags = {**sections["MODEL_ARGS"], **overrides, **layout.flags()}
    for name, size in asdict(layout).items():
        if size < 1:
            raise ValueError(f"--{name} {size}: give a number of ranks, 1 or more")
    if layout.ep == 1:
        raise ValueError(
            "--ep 1: one rank holds all experts, there is nothing to balance; give 2 or more"
        )
    for option, size, flag in (
        ("--ep", layout.ep, "--num-experts"),
        ("--pp", layout.pp, "--num-layers"),
        ("--tp", layout.tp, "--num-attention-heads"),
        ("--etp", layout.etp, "--moe-ffn-hidden-size"),
    ):
        total = int(str(flags[flag]))
        if total % size:
            raise ValueError(
                f"{option} {size}: the demo's model has {flag} {total}, which {size} does not "
                f"divide; give a divisor of {total}"
            )
    if (layout.etp * layout.ep) % layout.tp and layout.tp % (layout.etp * layout.ep):
        raise ValueError(
            f"--tp {layout.tp}: expert ranks (ETP x EP = {layout.etp * layout.ep}) and tensor "
            "ranks do not fit into each other; give sizes of which one divides the other"
        )
    return flags


def plan_phases(mixture_steps: int, domain_steps: int) -> list[Phase]:
    """The mixture of all domains first, then one of them alone."""
    return [
        Phase(name="mixture", domains=tuple(DOMAINS), first_step=1, steps=mixture_steps),
        Phase(
            name=f"{SECOND_DOMAIN} only",
            domains=(SECOND_DOMAIN,),
            first_step=mixture_steps + 1,
            steps=domain_steps,
        ),
    ]


def plan_runs(
    phases: list[Phase], layout: Layout, overrides: Flags, out: Path, nproc: int
) -> list[Run]:
    """The training commands in the order in which they run; each continues its kind's last."""
    has_wandb = importlib.util.find_spec("wandb") is not None
    runs = []
    for number, phase in enumerate(phases, start=1):
        for kind in ("plain", "llep"):
            folder = out / kind
            label = f"{kind}-{number}-{phase.name.replace(' ', '-')}"
            flags: Flags = {
                **overrides,
                **layout.flags(),
                "--global-batch-size": _global_batch_size(layout, overrides),
                "--train-iters": phase.last_step,
                "--data-path": _data_path(phase, out),
                "--data-cache-path": out / "data" / "cache",
                "--tensorboard-dir": folder / "tensorboard" / label,
                "--log-timers-to-tensorboard": True,
                "--moe-per-layer-logging": True,
            }
            if phase is not phases[-1]:
                flags |= {"--save": folder / "checkpoint", "--save-interval": phase.last_step}
            if phase is not phases[0]:
                # The learning-rate schedule is constant, only the number of steps grows.
                flags |= {"--load": folder / "checkpoint", "--override-opt-param-scheduler": True}
            if has_wandb:
                flags |= {
                    "--wandb-project": WANDB_PROJECT,
                    "--wandb-exp-name": label,
                    "--wandb-save-dir": out,
                }
            command = [sys.executable, str(ROOT / "tools" / "launch.py"), str(CONFIG)]
            command += ["--no-llep"] if kind == "plain" else []
            command += ["--nproc", str(nproc), "--", *format_flags(flags)]
            runs.append(
                Run(
                    kind=kind,
                    title=f"{'LLEP' if kind == 'llep' else 'plain EP'}, {phase.name}",
                    command=command,
                    log=out / "logs" / f"{label}.log",
                    tensorboard=folder / "tensorboard" / label,
                    steps=phase.steps,
                    first_step=phase.first_step,
                )
            )
    return runs


def _global_batch_size(layout: Layout, overrides: Flags) -> int:
    """One micro-batch a replica; as many as there are stages where pipelining needs them."""
    micro = overrides.get("--micro-batch-size")
    if micro is None:
        micro = load_config(CONFIG)["MODEL_ARGS"]["--micro-batch-size"]
    return int(str(micro)) * layout.data_parallel_size() * layout.pp


def _data_path(phase: Phase, out: Path) -> list[str]:
    prefixes = [str(out / "data" / domain) for domain in phase.domains]
    if len(prefixes) == 1:
        return prefixes
    weight = str(1 / len(prefixes))
    return [word for prefix in prefixes for word in (weight, prefix)]


def prepare_data(out: Path) -> Iterator[str]:
    """Make the corpora that are not there yet, or that another Python made; yields what it does.

    Raises:
        RuntimeError: a corpus could not be made; the message has the output of the command.
    """
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for domain, source in DOMAINS.items():
        prefix = folder / domain
        command = [sys.executable, str(ROOT / "tools" / "prepare_corpus.py"), *source]
        command += ["--append-eod", "--output-prefix", str(prefix)]
        receipt = folder / f"{domain}.json"
        files = [prefix.with_suffix(suffix) for suffix in (".bin", ".idx")]
        if receipt.is_file() and json.loads(receipt.read_text()) == _describe(command, files):
            yield f"{prefix}: already there"
            continue
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        receipt.write_text(json.dumps(_describe(command, files)))
        yield done.stdout.splitlines()[0]


def _describe(command: list[str], files: list[Path]) -> dict:
    sizes = [file.stat().st_size if file.is_file() else None for file in files]
    return {"command": command, "python": sys.version, "bytes": sizes}
