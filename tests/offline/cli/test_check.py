"""`check`: what it says of training configurations, without a world to train them."""

import pytest

from megatron_llep.offline.check.cases import read_cases
from megatron_llep.offline.check.parse import FlagReader
from megatron_llep.offline.check.verdict import CaseVerdict, judge
from megatron_llep.offline.cli import main

MOE = {"--num-experts": 128, "--expert-model-parallel-size": 8, "--moe-router-topk": 8}


@pytest.fixture(scope="module")
def reader() -> FlagReader:
    return FlagReader()


def of(reader: FlagReader, **flags: object) -> CaseVerdict:
    return judge(MOE | {"--" + name.replace("_", "-"): flags[name] for name in flags}, reader)


def test_layouts_and_what_lending_may_gain(reader):
    assert of(reader).lending == "EP 8, 128 experts, 16 a rank: lending can help"
    assert "nobody to lend to" in of(reader, expert_model_parallel_size=1).lending
    for flags in ({"moe_router_topk": 128}, {"moe_router_force_load_balancing": True}):
        assert "nothing to gain" in of(reader, **flags).lending


def test_accepted_replaced_and_refused(reader):
    """Of a world of 8 ranks, with flags that need a GPU and Transformer Engine."""
    verdict = of(
        reader,
        moe_token_dispatcher_type="flex",
        moe_permute_fusion=True,
        use_transformer_engine_op_fuser=True,
        use_megatron_fsdp=True,
        fp8_format="hybrid",
        moe_grouped_gemm=True,
        moe_router_fusion=True,
    )
    assert [line.split(":")[0] for line in verdict.notices] == [
        "--moe-token-dispatcher-type flex",
        "--moe-permute-fusion",
        "--use-transformer-engine-op-fuser",
    ]
    # Megatron's default recipe is the delayed one.
    assert [line.split(":")[0] for line in verdict.refused] == [
        "--fp8-recipe delayed",
        "--use-megatron-fsdp True",
    ]
    assert all("use " in line for line in verdict.refused)
    assert [line.split(":")[0] for line in verdict.untried] == ["--moe-router-fusion"]
    # Of MOE; --fp8-format and --moe-grouped-gemm; --fp8-recipe was not given.
    assert verdict.accepted == 3 + 2


def test_one_expert_parallel_rank_refuses_nothing(reader):
    verdict = of(reader, expert_model_parallel_size=1, use_megatron_fsdp=True)
    assert not verdict.refused
    assert not verdict.notices


def test_what_cannot_be_read_is_told_and_not_fatal(reader):
    verdict = of(reader, no_such_flag=3, num_layers="${LAYERS}", moe_llep_planner="magic")
    unknown, unreadable = verdict.unknown
    assert unknown.startswith("--no-such-flag: ")
    assert "--num-layers" in unreadable
    assert "LAYERS" in unreadable
    (refused,) = verdict.refused
    assert refused.startswith("--moe-llep-planner magic: ")


@pytest.mark.parametrize(
    "values", ["[moe_act layernorm]", "moe_act layernorm", ["moe_act", "layernorm"]]
)
def test_several_values(reader, values):
    verdict = of(reader, recompute_modules=values)
    assert not verdict.unknown


def test_no_experts(reader):
    (refused,) = judge({"--num-layers": 2}, reader).refused
    assert "set --num-experts" in refused
    from_checkpoint = judge({"--use-checkpoint-args": True}, reader)
    assert not from_checkpoint.refused


RECIPE = """
ENV_VARS:
  CUDA_DEVICE_MAX_CONNECTIONS: 1
TEST_TYPE: ckpt-resume
MODEL_ARGS:
  --num-experts: 8
  --expert-model-parallel-size: 2
  --bf16: true
"""

CASES = """
good:
  --num-experts: 8
  --expert-model-parallel-size: 2
bad:
  --num-experts: 7
  --expert-model-parallel-size: 2
"""


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


def test_files_and_flags(tmp_path, capsys):
    recipe, cases = write(tmp_path, "a.yaml", RECIPE), write(tmp_path, "b.yaml", CASES)
    assert main(["check", str(recipe), str(cases)]) == 1
    out = capsys.readouterr().out
    assert "2 of 3 start with --moe-llep" in out
    assert "REFUSED   --num-experts 7: must be a multiple" in out
    assert main(["check", str(cases), "--", "--num-experts", "16"]) == 0
    assert main(["check", "--", "--num-experts", "7", "--expert-model-parallel-size", "2"]) == 1
    assert main(["check"]) == 2


def test_own_configurations_with_a_base(tmp_path):
    write(tmp_path, "base.yaml", "MODEL_ARGS: {--num-experts: 8}")
    path = write(tmp_path, "own.yaml", "BASE: base.yaml\nLLEP_ARGS: {--moe-llep: true}")
    assert read_cases(path) == {"own.yaml": {"--num-experts": 8, "--moe-llep": True}}


@pytest.mark.parametrize("text", ["just text", "a: 1", "MODEL_ARGS: 3", "- 1"])
def test_a_file_without_flags(tmp_path, text):
    with pytest.raises(ValueError, match=r"no flags found|MODEL_ARGS"):
        read_cases(write(tmp_path, "none.yaml", text))
