"""What is refused of a `--hybrid-layer-pattern`, and in which script, before anything is built."""

import importlib.util
import sys

import pytest
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.training import global_vars
from megatron.training.argument_utils import hybrid_config_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.arguments import add_llep_arguments
from megatron_llep.integration.hybrid_pattern import refuse_kernels
from megatron_llep.layer import LLEPMoELayer
from megatron_llep.offline.check.parse import FlagReader
from megatron_llep.offline.check.verdict import judge
from megatron_llep.training.arguments import check_as_given
from megatron_llep.training.hf.arguments import add_hf_arguments
from megatron_llep.training.model_kind import check_kind
from support.layout import Layout, use_layout
from support.ranks import run_ranks
from support.versions import needs_megatron

PATTERN = "--hybrid-layer-pattern"
SMALL = ["--num-attention-heads", "4", "--hidden-size", "32", "--ffn-hidden-size", "64"]
SMALL += ["--seq-length", "16", "--max-position-embeddings", "16", "--micro-batch-size", "1"]
SMALL += ["--vocab-size", "64", "--tokenizer-type", "NullTokenizer", "--no-rope-fusion"]
SMALL += ["--transformer-impl", "local", "--no-gradient-accumulation-fusion"]
MOE = ["--num-experts", "8", "--expert-model-parallel-size", "2", "--moe-llep"]
SPEC = ["--spec", "megatron_llep.integration.hybrid_stack", "hybrid_stack_with_llep"]
GPT_SPEC = ["--spec", "megatron_llep.integration.spec", "gpt_layers_with_llep"]
LATENT = ["--moe-latent-size", "8", "--moe-shared-expert-overlap"]


@pytest.fixture
def read(monkeypatch):
    """Megatron's arguments of a command line, not yet validated."""

    def read(*flags):
        monkeypatch.setattr(sys, "argv", ["script.py", *SMALL, *flags])
        monkeypatch.setenv("WORLD_SIZE", "2")
        return parse_args(lambda parser: add_llep_arguments(add_hf_arguments(parser)))

    return read


HYBRID_SCRIPTS = needs_megatron((0, 19), "scripts that train hybrid models")
BAD = {
    "unknown symbol": (["*X", *MOE], "*X: ", "not a valid layer symbol"),
    "unlike depths": (["*E/*E/E", *MOE], "*E/*E/E: ", "must be identical"),
    "no layer": (["/*E", *MOE], "/*E: it names no layer", "one symbol a layer"),
    "segments": (
        ["*E|*E|*E", *MOE, "--pipeline-model-parallel-size", "2"],
        "3 segments do not spread over --pipeline-model-parallel-size 2",
        "by | between them",
    ),
    "stages that are not there": (
        ["*E|*E", *MOE],
        "2 segments are stages of a pipeline, and there is one",
        "set --pipeline-model-parallel-size",
    ),
    "no segments": (
        ["*E*", *MOE, "--pipeline-model-parallel-size", "2"],
        "3 layers do not divide over --pipeline-model-parallel-size 2",
        "say with | where each stage ends",
    ),
    "no experts": (["*E"], "*E: E is a layer of experts", "set --num-experts"),
    "nothing to lend": (["*-/*-", *MOE], "there is nothing to lend", "leave --moe-llep out"),
    "cut into steps": (
        ["*E", *MOE, "--overlap-moe-expert-parallel-comm"],
        "--overlap-moe-expert-parallel-comm: ",
        "leave the flag out",
    ),
    "latent and overlapped": (["*E", *MOE, *LATENT], "--moe-shared-expert-overlap", "leave"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_machine_trains(name, read):
    flags, what, way_out = BAD[name]
    with pytest.raises(ValueError, match=r"^--") as error:
        check_as_given(read(PATTERN, *flags))
    assert what in str(error.value)
    assert way_out in str(error.value)


@pytest.mark.parametrize(
    "pattern",
    [
        *("*E*E", "*-*E|*E*E", "E-|/*E/*E", "MEM*E", "*E|*E|*E|*E"),
        pytest.param("+E", marks=needs_megatron((0, 19), "latent attention in a pattern")),
    ],
)
def test_good_patterns_pass(pattern, read):
    stages = str(1 + pattern.count("|"))
    check_as_given(read(PATTERN, pattern, *MOE, "--pipeline-model-parallel-size", stages))


@HYBRID_SCRIPTS
def test_scripts_train_their_kind_of_model(read):
    gpt = read("--num-layers", "2", *MOE)
    check_kind(gpt, hybrid=False)
    with pytest.raises(ValueError, match=r"pattern is missing: .*pretrain/pretrain_gpt\.py"):
        check_kind(gpt, hybrid=True)
    for flag in (PATTERN, "--hybrid-override-pattern"):
        hybrid = read(flag, "*E", *MOE)
        check_kind(hybrid, hybrid=True)
        with pytest.raises(ValueError, match=r"pattern \*E: .*pretrain/pretrain_hybrid\.py"):
            check_kind(hybrid, hybrid=False)
    for hybrid, spec in ((False, SPEC), (True, GPT_SPEC)):
        kind = [PATTERN, "*E"] if hybrid else []
        with pytest.raises(ValueError, match=r"--spec .*: .* the other kind of model; give mega"):
            check_kind(read(*kind, *MOE, *spec), hybrid=hybrid)
    with pytest.raises(ValueError, match=r"--hf-load weights: .*leave the flag out"):
        check_kind(read(PATTERN, "*E", *MOE, "--hf-load", "weights"), hybrid=True)


@HYBRID_SCRIPTS
@pytest.mark.parametrize(("symbol", "module"), [("M", "mamba_ssm"), ("G", "fla")])
def test_kernels_that_are_missing(symbol, module, read):
    """Megatron raises an ImportError when the layer is built; here nothing has started yet."""
    args = read(PATTERN, f"{symbol}E*E", *MOE)
    with pytest.raises(ValueError, match=rf"{symbol}E\*E: {symbol} .*need a GPU.* \*E\*E here"):
        check_kind(args, hybrid=True)
    refusals = list(refuse_kernels(args, has_gpu=True))
    if importlib.util.find_spec(module) is None:
        assert len(refusals) == 1
        assert "pip install" in refusals[0]
    else:
        assert not refusals
    assert not list(refuse_kernels(read(PATTERN, "*E-", *MOE), has_gpu=False))


def test_sparse_attention_needs_transformer_engine(read):
    (refusal,) = refuse_kernels(read(PATTERN, "DE", *MOE), has_gpu=True)
    assert "D is sparse attention" in refusal
    assert "--transformer-impl transformer_engine" in refusal


def test_check_says_so_too():
    """Of a machine that is not there: kernels are none of its business."""
    reader = FlagReader()
    flags = {"--num-experts": 128, "--expert-model-parallel-size": 8}
    verdict = judge(flags | {PATTERN: "MEM*E"}, reader)
    assert verdict.lending == "EP 8, 128 experts, 16 a rank: lending can help"
    assert not verdict.refused
    (refusal,) = judge(flags | {PATTERN: "MM**"}, reader).refused
    assert "there is nothing to lend" in refusal


@pytest.mark.parametrize("knows_flags", [True, False], ids=["a script with our flags", "without"])
def test_the_stack_for_spec(knows_flags):
    """As Megatron's own script takes it: the specification is read before groups are there."""

    def work(rank: int, size: int) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            flags = [*MOE[:-1], PATTERN, "*E-/*E", *SPEC]
            flags += ["--moe-llep", "--moe-llep-planner", "lla"] if knows_flags else []
            flags += ["--distributed-backend", "gloo", "--position-embedding-type", "rope"]
            monkeypatch.setattr(sys, "argv", ["script.py", *SMALL, *flags])
            monkeypatch.setenv("WORLD_SIZE", "2")
            args = parse_and_validate_args(add_llep_arguments if knows_flags else None)
            config = hybrid_config_from_args(args)
            with use_layout(Layout(ep=2)):
                model = HybridModel(
                    config.transformer,
                    config.hybrid_stack_spec,
                    vocab_size=64,
                    max_sequence_length=16,
                    hybrid_layer_pattern=config.hybrid_layer_pattern,
                )
            global_vars.unset_global_variables()
        (layer,) = (m for m in model.decoder.modules() if isinstance(m, LLEPMoELayer))
        assert layer.layer_number == 2
        assert layer.llep == (LLEPConfig(planner="lla") if knows_flags else LLEPConfig())
        assert not any(isinstance(m, LLEPMoELayer) for m in model.mtp.modules())

    run_ranks(work, 2)
