"""What `make demo` runs: layout, phases, corpora and the four training commands."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_llep.offline.compare.comparison import Metric
from megatron_llep.offline.compare.rows import PhaseMark
from megatron_llep.offline.compare.wandb_out import wandb_is_on
from megatron_llep.offline.demo.driver import LAUNCHER, ROOT, SIDES, run_tool
from megatron_llep.offline.launch.execute import Run
from megatron_llep.offline.launch.flags import Flags, load_config
from megatron_llep.offline.launch.torchrun import layout_world_size
from megatron_llep.offline.launch.twins import KINDS, checkpoint_of, make_run

CONFIG = ROOT / "configs" / "demo.yaml"
WANDB_PROJECT = "megatron-llep-demo"
DOMAINS = {
    "docs": ("--builtin", "python-docs"),
    "code": ("--builtin", "python-stdlib", "--max-bytes", "4000000"),
}
"""Domain -> what tools/prepare_corpus.py makes it of."""
SECOND_DOMAIN = "code"
METRICS = (Metric(name="lm loss", label="loss"),)


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

    def __str__(self) -> str:
        return f"TP={self.tp} PP={self.pp} EP={self.ep} ETP={self.etp}"


@dataclass(frozen=True, kw_only=True)
class Phase(PhaseMark):
    """One part of the training, on a mixture of some domains."""

    domains: tuple[str, ...]


def check_layout(layout: Layout, overrides: Flags) -> None:
    """Check the layout against the demo's model, before anything runs.

    Args:
        layout: what was asked for.
        overrides: Megatron flags that replace the configuration's.

    Raises:
        ValueError: names the option, its value and the way out.
    """
    for name, size in asdict(layout).items():
        if size < 1:
            raise ValueError(f"--{name} {size}: give a number of ranks, 1 or more")
    if layout.ep == 1:
        raise ValueError(
            "--ep 1: one rank holds all experts, there is nothing to balance; give 2 or more"
        )
    flags = load_config(CONFIG)["MODEL_ARGS"] | overrides
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
    expert_ranks = layout.etp * layout.ep
    if expert_ranks % layout.tp and layout.tp % expert_ranks:
        raise ValueError(
            f"--tp {layout.tp}: expert ranks (ETP x EP = {expert_ranks}) and tensor "
            "ranks do not fit into each other; give sizes of which one divides the other"
        )


def plan_phases(mixture_steps: int, domain_steps: int) -> list[Phase]:
    """The mixture of all domains first, then one of them alone."""
    last = mixture_steps + domain_steps
    only = f"{SECOND_DOMAIN} only"
    return [
        Phase(name="mixture", domains=tuple(DOMAINS), first_step=1, last_step=mixture_steps),
        Phase(name=only, domains=(SECOND_DOMAIN,), first_step=mixture_steps + 1, last_step=last),
    ]


def plan_runs(phases: Sequence[Phase], layout: Layout, overrides: Flags, out: Path) -> list[Run]:
    """The training commands in the order in which they run; each continues its kind's last."""
    batch = load_config(CONFIG)["MODEL_ARGS"] | overrides
    # A micro-batch for each replica; as many as there are stages where pipelining needs them.
    replicas = layout.world_size() // layout.tp
    shared: Flags = {
        **overrides,
        **layout.flags(),
        "--global-batch-size": int(str(batch["--micro-batch-size"])) * replicas,
        "--data-cache-path": out / "data" / "cache",
        "--log-timers-to-tensorboard": True,
        "--moe-per-layer-logging": True,
    }
    runs = []
    for number, phase in enumerate(phases, start=1):
        part = f"{number}-{phase.name.replace(' ', '-')}"
        for kind in SIDES:
            flags = shared | {
                "--train-iters": phase.last_step,
                "--data-path": _data_path(phase, out),
            }
            if phase is not phases[-1]:
                flags |= {"--save": checkpoint_of(out, kind), "--save-interval": phase.last_step}
            if phase is not phases[0]:
                # The learning-rate schedule is constant, only the number of steps grows.
                flags |= {"--load": checkpoint_of(out, kind)}
                flags |= {"--override-opt-param-scheduler": True}
            if wandb_is_on():
                flags |= {"--wandb-project": WANDB_PROJECT, "--wandb-exp-name": f"{kind}-{part}"}
                flags |= {"--wandb-save-dir": out}
            runs.append(
                make_run(
                    kind,
                    f"{KINDS[kind]}, {phase.name}",
                    flags,
                    config=CONFIG,
                    launcher=LAUNCHER,
                    out=out,
                    nproc=layout.world_size(),
                    steps=phase.last_step - phase.first_step + 1,
                    first_step=phase.first_step,
                    phase=part,
                )
            )
    return runs


def _data_path(phase: Phase, out: Path) -> list[str]:
    """One prefix, or each after its weight."""
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
        prefix, receipt = folder / domain, folder / f"{domain}.json"
        options = [*source, "--append-eod", "--output-prefix", str(prefix)]
        if receipt.is_file() and json.loads(receipt.read_text()) == _describe(options, prefix):
            yield f"{prefix}: already there"
            continue
        printed = run_tool("prepare_corpus.py", *options)
        receipt.write_text(json.dumps(_describe(options, prefix)))
        yield printed.splitlines()[0]


def _describe(options: list[str], prefix: Path) -> dict[str, object]:
    """What a corpus was made of, and how large it is."""
    files = [prefix.with_suffix(suffix) for suffix in (".bin", ".idx")]
    sizes = [file.stat().st_size if file.is_file() else None for file in files]
    return {"options": options, "python": sys.version, "bytes": sizes}
