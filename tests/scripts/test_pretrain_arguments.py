"""Bad command lines end with a ValueError before any process group exists.

Parsed by Megatron's real parser; what the script itself does with them is in test_pretrain.py.
"""

import sys

import pytest
import torch.distributed as dist
from megatron.training.arguments import parse_args
from script_runs import tiny_flags

from megatron_llep.integration.arguments import add_llep_arguments
from megatron_llep.lending.progress import Progress
from megatron_llep.training.arguments import check_as_given, read_arguments
from megatron_llep.training.data import check_pretraining
from megatron_llep.training.model import build_model_config
from support.versions import needs_megatron

LLEP = "--moe-llep"
DATA = ["--mock-data"]


@pytest.fixture
def use_command_line(monkeypatch, unset_arguments):
    def use(flags):
        # What the script adds where no GPU is.
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *flags, "--transformer-impl", "local"])
        monkeypatch.setenv("WORLD_SIZE", "2")

    return use


def test_the_good_command_line_passes(use_command_line):
    use_command_line(tiny_flags(*DATA))
    llep = check_as_given(parse_args(add_llep_arguments))
    assert llep.enabled
    assert llep.min_tokens_per_gemm == 16
    use_command_line(tiny_flags(*DATA, without=[LLEP]))
    assert not check_as_given(parse_args(add_llep_arguments)).enabled


def test_help_names_the_flags(use_command_line, capsys):
    use_command_line(["--help"])
    with pytest.raises(SystemExit) as ended:
        read_arguments(lambda parser: parser, lambda args: None)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "--moe-llep-planner" in out
    assert "--num-experts" in out
    assert "%%" not in out


BAD = {
    "planner": (
        ["--moe-llep-planner", "best"],
        "--moe-llep-planner best",
        "choose one of tolerant",
    ),
    "capacity 0.5": (
        ["--moe-llep-capacity-factor", "0.5"],
        "--moe-llep-capacity-factor 0.5",
        "at least 1",
    ),
    "capacity nan": (
        ["--moe-llep-capacity-factor", "nan"],
        "--moe-llep-capacity-factor nan",
        "at least 1",
    ),
    "threshold": (
        ["--moe-llep-imbalance-threshold=-1"],
        "--moe-llep-imbalance-threshold -1.0",
        "0 or more",
    ),
    "tokens": (
        ["--moe-llep-min-tokens-per-gemm=-1"],
        "--moe-llep-min-tokens-per-gemm -1",
        "0 or more",
    ),
    "foreign 99": (
        ["--moe-llep-max-foreign-experts", "99"],
        "--moe-llep-max-foreign-experts 99",
        "at most as many",
    ),
    "foreign -1": (
        ["--moe-llep-max-foreign-experts=-1"],
        "--moe-llep-max-foreign-experts -1",
        "0 or more",
    ),
    "tensor parallel": (
        ["--tensor-model-parallel-size", "2"],
        "--tensor-model-parallel-size 2",
        "add that flag",
    ),
    "indivisible": (["--num-experts", "7"], "--num-experts 7", "must be a multiple"),
    "dense": (["--num-experts", "0"], "--moe-llep", "set --num-experts"),
    "padding": (
        ["--moe-pad-expert-input-to-capacity"],
        "--moe-pad-expert-input-to-capacity True",
        "leave the flag out",
    ),
    "offloading": (
        ["--cpu-offloading-num-layers", "1"],
        "--cpu-offloading-num-layers True",
        "leave the flag out",
    ),
    "fsdp": (["--use-torch-fsdp2"], "--use-torch-fsdp2", "--use-distributed-optimizer"),
    "gather with step": (
        ["--overlap-param-gather-with-optimizer-step"],
        "--overlap-param-gather-with-optimizer-step",
        "leave the flag out",
    ),
    "activations": (
        ["--save-activations-interval", "2"],
        "--save-activations-interval",
        "leave the flag out",
    ),
    "dgrads": (["--save-dgrads-interval", "2"], "--save-dgrads-interval", "leave the flag out"),
    "tokens per expert": (
        ["--save-tokens-per-expert-interval", "2"],
        "--save-tokens-per-expert-interval",
        "use --moe-routing-trace-path",
    ),
    "fake": (["--fake-process-group"], "--fake-process-group", "leave the flag out"),
    "hybrid": (
        ["--hybrid-context-parallel"],
        "--hybrid-context-parallel True",
        "leave the flag out",
    ),
    "inference": (
        ["--moe-pad-experts-for-cuda-graph-inference"],
        "--moe-pad-experts-for-cuda-graph-inference True",
        "leave the flag out",
    ),
    "grouped latent": (
        ["--multi-latent-attention", "--group-query-attention"],
        "--group-query-attention",
        "leave the flag out",
    ),
    "sft": (["--sft"], "--sft", "leave the flag out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_name_flag_value_and_remedy(case, use_command_line):
    flags, named, remedy = BAD[case]
    use_command_line(tiny_flags(*DATA, *flags))
    # The very call of the script: no assertion of Megatron's validation comes first.
    with pytest.raises(ValueError, match=r"^--") as error:
        read_arguments(lambda parser: parser, check_pretraining)
    assert str(error.value).startswith(named)
    assert remedy in str(error.value)
    assert not dist.is_initialized()


def test_without_llep_megatron_decides(use_command_line):
    use_command_line(tiny_flags(*DATA, *BAD["padding"][0], without=[LLEP]))
    check_as_given(parse_args(add_llep_arguments))


def test_the_shape_may_come_from_a_checkpoint(use_command_line):
    flags = tiny_flags(*DATA, "--use-checkpoint-args", without=["--num-experts"])
    use_command_line(flags)
    assert check_as_given(parse_args(add_llep_arguments)).enabled


def test_data_must_be_named(use_command_line):
    use_command_line(tiny_flags())
    with pytest.raises(ValueError, match=r"--data-path is missing: .* --mock-data") as error:
        read_arguments(lambda parser: parser, check_pretraining)
    assert "tools/prepare_corpus.py" in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--data-path", "data/docs"],
        ["--data-args-path", "blend.txt"],
        ["--train-data-path", "data/docs"],
        ["--per-split-data-args-path", "blend.json"],
        ["--mock-data"],
    ],
)
def test_every_way_to_name_data_passes(flags, use_command_line):
    use_command_line(tiny_flags(*flags))
    check_pretraining(parse_args(add_llep_arguments))


def test_planning_is_taken_out_of_published_graphs(use_command_line):
    modules = ["attn", "moe_router", "moe_preprocess"]
    for flag in ("--cuda-graph-scope", "--cuda-graph-modules"):
        graphs = ["--cuda-graph-impl", "transformer_engine", flag, *modules, "--no-rope-fusion"]
        use_command_line(tiny_flags(*DATA, *graphs))
        check_as_given(parse_args(add_llep_arguments))
    args, llep = read_arguments(lambda parser: parser, check_pretraining)
    build_model_config(args, llep, Progress())
    assert [module.name for module in args.cuda_graph_modules] == ["attn", "moe_router"]


def test_graphs_of_planning_alone_are_not_captured(use_command_line):
    """As Qwen3-235B is trained. Megatron's loop captures by its arguments, its layers by theirs."""
    graphs = ["--cuda-graph-impl", "transformer_engine"]
    graphs += ["--cuda-graph-modules", "moe_router", "moe_preprocess"]
    recompute = ["--recompute-granularity", "selective", "--recompute-modules", "layernorm"]
    use_command_line(tiny_flags(*DATA, *graphs, *recompute, "--no-rope-fusion"))
    args, llep = read_arguments(lambda parser: parser, check_pretraining)
    config = build_model_config(args, llep, Progress()).transformer
    for each in (args, config):
        assert (each.cuda_graph_impl, each.cuda_graph_modules) == ("none", [])


GROUPED = ["--group-query-attention", "--num-query-groups"]


def test_heads_that_do_not_divide_the_width_need_a_width_of_their_own(use_command_line):
    flags = [*DATA, "--num-attention-heads", "3", "--multi-latent-attention"]
    use_command_line(tiny_flags(*flags, without=GROUPED))
    check_as_given(parse_args(add_llep_arguments))
    use_command_line(tiny_flags(*flags, without=[*GROUPED, "--kv-channels"]))
    with pytest.raises(ValueError, match=r"^--num-attention-heads 3: .*--kv-channels"):
        check_as_given(parse_args(add_llep_arguments))


LATENT = ["--multi-latent-attention", "--kv-lora-rank", "9", "--qk-pos-emb-head-dim", "4"]


@needs_megatron((0, 19), "latent attention without Transformer Engine")
def test_latent_attention_that_cannot_be_cut_is_refused(use_command_line):
    cut = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    use_command_line(tiny_flags(*DATA, *LATENT, *cut, "--no-rope-fusion", without=GROUPED))
    args, llep = read_arguments(lambda parser: parser, check_pretraining)
    with pytest.raises(ValueError, match=r"^--tensor-model-parallel-size 2: .*together 13"):
        build_model_config(args, llep, Progress())
    assert not dist.is_initialized()


def test_what_llep_replaces_makes_a_configuration_without_a_gpu(use_command_line):
    flags = ["--moe-token-dispatcher-type", "flex", "--moe-enable-deepep", "--moe-permute-fusion"]
    flags += ["--moe-permute-fusion-into-hybridep", "--moe-router-padding-for-quantization"]
    flags += ["--no-rope-fusion"]
    use_command_line(tiny_flags(*DATA, *flags))
    args, llep = read_arguments(lambda parser: parser, check_pretraining)
    config = build_model_config(args, llep, Progress()).transformer
    assert config.moe_token_dispatcher_type == "alltoall"
    assert not config.moe_permute_fusion
    assert args.moe_token_dispatcher_type == "flex"  # as the user gave it, for checkpoints
