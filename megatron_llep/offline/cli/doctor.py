"""`doctor`: what is installed, what of Megatron is where LLEP expects it, how to mend the rest."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MEGATRON = "'megatron-core>=0.19,<0.20'"
TRANSFORMER_ENGINE = "transformer_engine.pytorch"
TRANSFORMER_ENGINE_TESTED = (2, 20)
# What LLEP calls or sets in it, in a process of its own: what is imported in part stays in part.
TRANSFORMER_ENGINE_CHECK = f"""
import torch, {TRANSFORMER_ENGINE} as te
te.GroupedLinear.init_fp8_metadata, te.Fp8Padding, te.Fp8Unpadding
"""

SEAMS = {
    "megatron.core.parallel_state": ("create_group",),
    "megatron.core.process_groups_config": ("ProcessGroupCollection",),
    "megatron.core.tensor_parallel.random": ("is_checkpointing",),
    "megatron.core.extensions.transformer_engine": ("TEGroupedLinear",),
    "megatron.core.transformer.mlp": ("MLP.forward",),
    "megatron.core.transformer.moe.experts": ("SequentialMLP.forward", "TEGroupedMLP.forward"),
    "megatron.core.transformer.moe.moe_layer": (
        "MoELayer.preprocess",
        "MoELayer.routed_experts_compute",
        "MoESubmodules",
    ),
    "megatron.core.transformer.moe.moe_logging": (
        "MoEMetricsTracker.report",
        "get_moe_metrics_tracker",
        "set_moe_metrics_tracker",
    ),
    "megatron.core.transformer.moe.moe_utils": ("get_default_pg_collection",),
    "megatron.core.transformer.moe.token_dispatcher": (
        "MoEAlltoAllTokenDispatcher.dispatch_preprocess",
        "MoEAlltoAllTokenDispatcher.dispatch_postprocess",
        "MoEAlltoAllTokenDispatcher.combine_preprocess",
        "MoEFlexTokenDispatcher.dispatch_preprocess",
        "MoETokenDispatcher.set_shared_experts",
    ),
    "megatron.training.argument_utils": ("ArgumentGroupFactory",),
    "megatron.training.models.gpt": ("GPTModelConfig", "default_layer_spec"),
}
"""Where LLEP joins Megatron: what it extends, overrides or replaces."""

OPTIONAL = {
    "matplotlib": "pictures: pip install 'megatron-llep[plot]'",
    "scipy": "the optimum that planners are compared with: pip install scipy",
    "tensorboard": "training curves: pip install 'megatron-llep[train]'",
    "tqdm": "progress bars: pip install 'megatron-llep[train]'",
    "wandb": "training curves: pip install 'megatron-llep[wandb]'",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found."""

    state: Literal["ok", "note", "BROKEN"]
    what: str
    remedy: str = ""
    """How to mend it, or what a note is about."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has no flags."""
    parser.description = (
        "Check versions, the places where LLEP joins Megatron, and known traps. Exit status 1 if "
        "something is broken."
    )


def run(args: argparse.Namespace) -> int:
    """Print what was found; 1 if something is broken, else 0."""
    broken = 0
    for finding in examine():
        broken += finding.state == "BROKEN"
        print(f"{finding.state:7}{finding.what}")
        if finding.remedy:
            print(f"{'':7}  {finding.remedy}")
    print(f"\n{broken} broken" if broken else "\nnothing is broken")
    return 1 if broken else 0


def examine() -> Iterator[Finding]:
    """All checks, those that explain others' failures first."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        check_torch,
        check_transformer_engine,
        check_apex,
        check_megatron,
        check_optional,
    )
    for check in checks:
        yield from check()


def check_torch() -> Iterator[Finding]:
    """Python, torch, and what Megatron would run on."""
    yield Finding(state="ok", what=f"Python {platform.python_version()}")
    try:
        import torch
    except ImportError as error:
        yield Finding(state="BROKEN", what=f"torch: {error}", remedy="pip install 'torch>=2.6'")
        return
    if _numbers(torch.__version__) < (2, 6):
        remedy = "pip install --upgrade 'torch>=2.6'"
        yield Finding(state="BROKEN", what=f"torch {torch.__version__} is too old", remedy=remedy)
    else:
        yield Finding(state="ok", what=f"torch {torch.__version__}")
    if torch.cuda.is_available():
        name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        yield Finding(state="ok", what=f"Megatron runs on GPUs over NCCL: {name}")
        return
    yield Finding(state="ok", what="Megatron runs on the CPU over gloo: torch sees no GPU")
    if importlib.util.find_spec("triton") is None:
        remedy = "megatron-core imports it even without a GPU: pip install triton"
        yield Finding(state="BROKEN", what="triton: not installed", remedy=remedy)


def check_transformer_engine() -> Iterator[Finding]:
    """Whether it is whole or absent; a part of it breaks Megatron's import."""
    installed = [
        f"{name} {importlib.metadata.version(name)}"
        for name in ("transformer-engine", "transformer-engine-cu12", "transformer-engine-cu13")
        if _is_installed(name)
    ]
    what = ", ".join(installed) or "transformer-engine"
    if not installed and importlib.util.find_spec("transformer_engine") is None:
        remedy = "optional: for --moe-grouped-gemm; SequentialMLP's experts need none"
        yield Finding(state="note", what=f"{what}: not installed", remedy=remedy)
        return
    command = [sys.executable, "-c", TRANSFORMER_ENGINE_CHECK]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        versions = {_numbers(name.split()[1]) for name in installed}
        if versions <= {TRANSFORMER_ENGINE_TESTED}:
            yield Finding(state="ok", what=what)
        else:
            tested = ".".join(map(str, TRANSFORMER_ENGINE_TESTED))
            yield Finding(state="note", what=what, remedy=f"LLEP was tested with {tested}")
        return
    yield Finding(
        state="BROKEN",
        what=f"{what}: half installed, and Megatron's import fails on it ({_last_line(done)})",
        remedy="bash tools/install_te.sh VENV (what it takes is in docs/gpu.md), or pip uninstall "
        "each of its packages",
    )


def check_apex() -> Iterator[Finding]:
    """NVIDIA's is optional; PyPI has another project of that name."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        yield Finding(state="note", what="apex: not installed", remedy="optional; not from PyPI")
        return
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "optimizers").is_dir() for folder in folders):
        yield Finding(state="ok", what="apex: NVIDIA's")
        return
    yield Finding(
        state="BROKEN",
        what="apex: not NVIDIA's, but another project of the same name, from PyPI",
        remedy="pip uninstall apex; NVIDIA's is built from github.com/NVIDIA/apex",
    )


def check_megatron() -> Iterator[Finding]:
    """Version, import, seams, and what LLEP does not support."""
    if not _is_installed("megatron-core"):
        remedy = f"pip install {MEGATRON}"
        yield Finding(state="BROKEN", what="megatron-core: not installed", remedy=remedy)
        return
    version = importlib.metadata.version("megatron-core")
    if _numbers(version) != (0, 19):
        yield Finding(
            state="BROKEN",
            what=f"megatron-core {version}: LLEP extends 0.19",
            remedy=f"pip install {MEGATRON}",
        )
    else:
        yield Finding(state="ok", what=f"megatron-core {version}")
    try:
        missing = find_missing_seams()
    except Exception as error:  # whatever another package's import may raise
        yield Finding(
            state="BROKEN",
            what=f"megatron-core cannot be imported: {type(error).__name__}: {error}",
            remedy="mend what is broken above; if nothing is, pip install --force-reinstall "
            f"{MEGATRON}",
        )
        return
    if missing:
        yield Finding(
            state="BROKEN",
            what=f"Megatron lacks what LLEP extends: {', '.join(missing)}",
            remedy=f"pip install {MEGATRON}",
        )
        return
    count = sum(len(names) for names in SEAMS.values())
    yield Finding(state="ok", what=f"all {count} places where LLEP joins Megatron are there")
    from megatron_llep.integration.settings.refused import REFUSED

    flags = ", ".join(setting.flag for setting in REFUSED)
    yield Finding(
        state="note",
        what="supported: experts of SequentialMLP, and of TEGroupedMLP with Transformer Engine; "
        "layouts and recompute modes are in docs/parallelism.md; ask for yours with "
        "`python -m megatron_llep check`",
        remedy=f"refused at start-up: {flags}",
    )


def check_optional() -> Iterator[Finding]:
    """Packages that some tools need."""
    for name, remedy in OPTIONAL.items():
        if _is_installed(name):
            yield Finding(state="ok", what=f"{name} {importlib.metadata.version(name)}")
        else:
            yield Finding(state="note", what=f"{name}: not installed", remedy=remedy)


def find_missing_seams() -> list[str]:
    """The entries of `SEAMS` that Megatron does not have, as `module.name`.

    Raises:
        Exception: whatever Megatron's import raises, other than that such a module is missing.
    """
    from megatron_llep.device import use_cpu_if_no_gpu

    missing = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        use_cpu_if_no_gpu()
        for module_name, names in SEAMS.items():
            try:
                module = importlib.import_module(module_name)
            except ModuleNotFoundError as error:
                if not (error.name or "").startswith("megatron"):
                    raise
                missing.append(module_name)
                continue
            missing += [f"{module_name}.{name}" for name in names if not _has(module, name)]
    return missing


def _has(owner: object, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in version.split(".")[:2])


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"
