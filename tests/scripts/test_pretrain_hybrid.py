"""The script for hybrid models: as `pretrain_gpt.py`, with layers of a pattern."""

from pathlib import Path

import pytest
from script_runs import ROOT, Log, run_tiny

from megatron_llep.offline.workloads import read_trace
from support.versions import needs_megatron

SCRIPT = ROOT / "pretrain" / "pretrain_hybrid.py"
CONFIGS = ROOT / "configs"
TOLERANCE = 1e-5
STEPS = 3

pytestmark = [
    pytest.mark.timeout(600),  # a test may start the script three times
    needs_megatron((0, 19), "scripts that train hybrid models"),
]


def run(
    pattern: str,
    *flags: object,
    llep: bool,
    config: str = "tiny-latent",
    as_user: bool = False,
    **layout: object,
) -> Log:
    flags = ("--mock-data", "--train-iters", STEPS, "--hybrid-layer-pattern", pattern, *flags)
    options = {"config": CONFIGS / f"{config}.yaml", "script": SCRIPT, "layout": layout}
    return run_tiny(flags, llep=llep, as_user=as_user, **options)


def assert_same(lending: Log, plain: Log) -> None:
    assert len(plain.losses) == STEPS
    for step, expected in plain.losses.items():
        assert lending.losses[step] == pytest.approx(expected, rel=TOLERANCE)
    assert max(lending.read("lent_experts").values()) > 0
    assert max(lending.read("overload_factor_after").values()) < 1.1


@pytest.fixture(scope="module")
def lending() -> Log:
    return run("*E-E/*E", llep=True, as_user=True)


def test_trains_as_plain_megatron_does(lending):
    """Latent experts, in multi-token prediction too."""
    assert_same(lending, run("*E-E/*E", llep=False))


def test_first_lines_name_the_device_and_the_added_flags(lending):
    head = lending.text.split("arguments ---")[0].splitlines()
    device = [line for line in head if "Megatron runs on the CPU" in line]
    added = [line for line in head if line.startswith("no GPU: added")]
    assert len(device) == len(added) == 1  # rank 0 alone
    words = "--distributed-backend gloo --transformer-impl local --no-masked-softmax-fusion "
    words += "--no-persist-layer-norm --no-rope-fusion"
    assert added == [f"no GPU: added {words}"]


@pytest.mark.slow
def test_unlike_stages(tmp_path: Path):
    """Virtual stages, one rank without experts; router losses and traces are of all layers."""
    pattern, losses = "**|-E|*|*E/*E/*E", ["--moe-router-load-balancing-type", "aux_loss"]
    losses += ["--moe-aux-loss-coeff", 0.01, "--moe-z-loss-coeff", 0.001]
    layout = {"pipeline-model-parallel-size": 2}
    trace = ["--moe-routing-trace-path", tmp_path]
    lending = run(pattern, *losses, *trace, llep=True, **layout)
    plain = run(pattern, *losses, llep=False, **layout)
    assert_same(lending, plain)
    for name in ("load_balancing_loss", "z_loss", "mtp_2 loss"):
        assert plain.read(name)
        assert lending.read(name) == pytest.approx(plain.read(name), rel=1e-3)
    traced = {each.layer for each in read_trace(tmp_path, num_ranks=2, num_experts=8)}
    assert traced == {"decoder 3", "decoder 6", "mtp 0.1", "mtp 1.1"}


@pytest.mark.slow
def test_switched_on_by_the_specification():
    spec = ["--spec", "megatron_llep.integration.hybrid_stack", "hybrid_stack_with_llep"]
    lending = run("*E*E/*E", *spec, llep=True)
    assert_same(lending, run("*E*E/*E", llep=False))


@pytest.mark.slow
def test_a_gpt_models_checkpoint(tmp_path: Path):
    """Megatron reads it into the hybrid model of its layers, which goes on as the GPT model."""
    gpt = ["--mock-data", "--num-layers", 2, "--train-iters", STEPS]
    saving = ["--save", tmp_path, "--save-interval", STEPS, "--ckpt-format", "torch_dist"]
    loading = ["--load", tmp_path, "--finetune", "--no-load-optim", "--no-load-rng"]
    before = run_tiny([*gpt, *saving], llep=False)
    expected = run_tiny([*gpt, *loading], llep=False)
    assert expected.losses[1] < before.losses[1]
    assert_same(run("*E*E", *loading, llep=True, config="tiny-hybrid"), expected)
