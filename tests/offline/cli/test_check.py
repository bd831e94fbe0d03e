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


@pytest.mark.parametrize("name", ["--moe-router-topk", "--moe_router_topk", "moe_router_topk"])
@pytest.mark.parametrize("value", [128, "128", "'128'", [128]])
def test_names_and_values_as_others_write_them(reader, name, value):
    verdict = judge(MOE | {name: value, "bf16": True, "fp8": None, "--swiglu": "true"}, reader)
    assert "every token goes to all" in verdict.lending
    assert not verdict.unknown


@pytest.mark.parametrize("value", ["false", False, None, 0])
def test_flags_that_are_off(reader, value):
    verdict = of(reader, use_megatron_fsdp=value, tp_comm_overlap=value)
    assert not verdict.refused + verdict.untried + verdict.unknown
    # Under the name that Megatron's arguments have, of what the flag switches off.
    by_name = judge(MOE | {"gradient_accumulation_fusion": value}, reader)
    assert not by_name.unknown


def test_a_layout_that_is_not_filled_in_is_judged_as_one_that_lends(reader):
    size = "--expert-model-parallel-size"
    verdict = of(reader, expert_model_parallel_size="${EP}", use_megatron_fsdp=True)
    assert verdict.lending.startswith("EP ${EP}, 128 experts: ")
    assert f"give {size} NUMBER after --" in verdict.lending
    assert [line.split(":")[0] for line in verdict.refused] == ["--use-megatron-fsdp True"]
    (left_open,) = verdict.unknown
    assert left_open.startswith(f"{size} ${{EP}}: not filled in")
    verdict = of(reader, num_experts="$EXPERTS")
    assert verdict.lending.startswith("EP 8, $EXPERTS experts: ")
    assert not verdict.refused


PLACEHOLDERS = """
ENV_VARS: {EP: 4, SIZE: "${TP:-2}", TP: "${TP:-1}"}
MODEL_ARGS:
  --num-experts: ${EXPERTS:-8}
  --expert-model-parallel-size: ${EP}
  --tensor-model-parallel-size: $SIZE
  --micro-batch-size: ${MBS}
"""

PRIMUS = """
workspace: ${WORKSPACE:./output}
modules:
  pre_trainer:
    framework: megatron
    model: ${MODEL:moe}.yaml
    overrides:
      expert_model_parallel_size: ${PRIMUS_EP:8}
      moe_token_dispatcher_type: flex
      lr_decay_iters: null
"""

SCRIPT = """
#!/bin/bash
# --num-experts 3
EP=${EP:-4}; SIZES="a b"
if [ $1 = big ]; then
    HIDDEN=128
else
    HIDDEN=64
fi
moe_options=" \
    --moe-grouped-gemm \
    --num-experts 16 --moe-layer-freq '([0]*1+[1]*3)'
"
ARGS=(
    --expert-model-parallel-size $EP  # of experts
    --moe-router-topk=2
    --hidden-size ${HIDDEN}
    --seq-length $((1024 * 2)) --bf16)
echo "start --use-megatron-fsdp"
torchrun --nproc-per-node 8 train.py ${ARGS[@]} ${moe_options} --swiglu "$@" 2>&1 | tee log
"""


def test_variables_are_filled_in(tmp_path, reader):
    (flags,) = read_cases(write(tmp_path, "a.yaml", PLACEHOLDERS), reader.knows).values()
    assert flags == {
        "--num-experts": "8",
        "--expert-model-parallel-size": "4",
        "--tensor-model-parallel-size": "1",
        "--micro-batch-size": "${MBS}",
    }


def test_primus(tmp_path, reader):
    recipe = write(tmp_path, "a.yaml", PRIMUS)
    (flags,) = read_cases(recipe, reader.knows).values()
    assert judge(flags, reader).lending.startswith("EP 8, $(in moe.yaml) experts")
    models = tmp_path / "primus/configs/models/megatron"
    models.mkdir(parents=True)
    write(models, "base.yaml", "num_experts: 8\nexpert_model_parallel_size: 1")
    write(models, "moe.yaml", "extends: [base.yaml]\nnum_experts: 64\nown_key: 1")
    (flags,) = read_cases(recipe, reader.knows).values()
    verdict = judge(flags, reader)
    assert verdict.lending.startswith("EP 8, 64 experts")
    assert [line.split(":")[0] for line in verdict.notices] == ["--moe-token-dispatcher-type flex"]
    assert verdict.unknown == ["own_key: no flag of Megatron's or LLEP's"]


def test_a_script(tmp_path, reader):
    ((name, flags),) = read_cases(write(tmp_path, "a.sh", SCRIPT), reader.knows).items()
    assert name == "a.sh, all its branches"
    assert flags == {
        "--moe-grouped-gemm": True,
        "--num-experts": ["16"],
        "--moe-layer-freq": ["([0]*1+[1]*3)"],
        "--expert-model-parallel-size": ["4"],
        "--moe-router-topk": ["2"],
        "--hidden-size": ["${HIDDEN}"],
        "--seq-length": ["$((1024*2))"],
        "--bf16": True,
        "--nproc-per-node": ["8", "train.py"],
        "--swiglu": True,
    }
    verdict = judge(flags, reader)
    assert verdict.lending == "EP 4, 16 experts, 4 a rank: lending can help"
    assert not verdict.refused


def test_flags_of_several_commands_stay_open(tmp_path, reader):
    text = "train --num-experts 8\ntrain --num-experts 16\n"
    (flags,) = read_cases(write(tmp_path, "a.sh", text), reader.knows).values()
    assert judge(flags, reader).unknown[0].startswith("--num-experts $(8 or 16): not filled in")
    with pytest.raises(ValueError, match="after --"):
        read_cases(write(tmp_path, "b.sh", "python train.py trainer.size=8"), reader.knows)


def test_a_file_that_cannot_be_read_does_not_hide_the_others(tmp_path, capsys):
    good, bad = write(tmp_path, "a.yaml", RECIPE), write(tmp_path, "b.yaml", "a: 1")
    assert main(["check", str(bad), str(good)]) == 2
    said = capsys.readouterr()
    assert "1 of 1 start with --moe-llep" in said.out
    assert "b.yaml: no flags found" in said.out + said.err


def test_files_and_flags(tmp_path, capsys):
    recipe, cases = write(tmp_path, "a.yaml", RECIPE), write(tmp_path, "b.yaml", CASES)
    assert main(["check", str(recipe), str(cases)]) == 1
    out = capsys.readouterr().out
    assert "2 of 3 start with --moe-llep" in out
    assert "REFUSED   --num-experts 7: must be a multiple" in out
    assert main(["check", str(cases), "--", "--num-experts", "16"]) == 0
    assert main(["check", "--", "--num-experts", "7", "--expert-model-parallel-size", "2"]) == 1
    assert main(["check"]) == 2


def test_own_configurations_with_a_base(tmp_path, reader):
    write(tmp_path, "base.yaml", "MODEL_ARGS: {--num-experts: 8}")
    path = write(tmp_path, "own.yaml", "BASE: base.yaml\nLLEP_ARGS: {--moe-llep: true}")
    assert read_cases(path, reader.knows) == {"own.yaml": {"--num-experts": 8, "--moe-llep": True}}


@pytest.mark.parametrize("text", ["just text", "a: 1", "MODEL_ARGS: 3", "- 1"])
def test_a_file_without_flags(tmp_path, reader, text):
    with pytest.raises(ValueError, match=r"no flags found|MODEL_ARGS"):
        read_cases(write(tmp_path, "none.yaml", text), reader.knows)
