"""tools/launch.py: YAML, overrides and layout become one torchrun command."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_llep.integration.arguments import add_llep_arguments
from megatron_llep.offline.launch.flags import load_config
from megatron_llep.offline.launch.torchrun import choose_environment, layout_world_size
from support.ports import find_free_port

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import launch  # noqa: E402

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TINY = ROOT / "configs" / "tiny.yaml"


@pytest.fixture
def script(tmp_path):
    """A script to launch that says who it is."""
    path = tmp_path / "script.py"
    path.write_text(
        "import os, sys\n"
        "keys = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'OMP_NUM_THREADS')\n"
        "words = [os.environ[key] for key in keys] + sys.argv[1:]\n"
        "os.write(1, (' '.join(words) + '\\n').encode())\n"  # whole lines from every process
    )
    return path


@pytest.fixture
def dry_run(capsys, script):
    """Run launch.py in dry-run mode; gives the printed tokens after any VAR=value."""

    def run(*argv, config=TINY):
        launch.main([str(config), "--dry-run", "--script", str(script), *argv])
        return shlex.split(capsys.readouterr().out)

    return run


def parse_as_megatron(tokens, script):
    parser = add_llep_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return parser.parse_args(tokens[tokens.index(str(script)) + 1 :])


def write_yaml(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_no_llep_leaves_out_every_llep_flag(dry_run, script):
    tokens = dry_run("--no-llep")
    assert not any("llep" in token for token in tokens if token.startswith("--moe"))
    assert not parse_as_megatron(tokens, script).moe_llep


def test_later_flags_win_and_appear_once(dry_run, script):
    tokens = dry_run("--set", "--seed=2", "--set", "train-iters=3", "--", "--seed", "4")
    assert tokens.count("--seed") == 1
    args = parse_as_megatron(tokens, script)
    assert (args.seed, args.train_iters) == (4, 3)


def test_set_adds_and_removes_bare_flags(dry_run):
    assert "--swiglu" in dry_run()
    assert "--swiglu" not in dry_run("--set", "--swiglu=false")
    assert "--bf16" in dry_run("--set", "--bf16")


def test_set_takes_yaml_lists(dry_run, script):
    args = parse_as_megatron(dry_run("--set", "--data-path=[0.5, a, 0.5, b]"), script)
    assert args.data_path == ["0.5", "a", "0.5", "b"]


def test_extra_flags_may_have_several_values_and_equals_signs(dry_run, script):
    args = parse_as_megatron(dry_run("--", "--data-path", "a", "b", "--seed=9", "--bf16"), script)
    assert (args.data_path, args.seed, args.bf16) == (["a", "b"], 9, True)


def test_values_reach_the_command_unsplit(dry_run):
    path = ROOT / "configs" / "deepseek-v3.yaml"
    tokens = dry_run("--nproc", "1", config=path)
    assert tokens[tokens.index("--moe-layer-freq") + 1] == "([0]*3+[1]*58)"


@pytest.mark.parametrize(
    ("sizes", "world"),
    [
        ({}, 1),
        ({"--expert-model-parallel-size": 4}, 4),
        ({"--tensor-model-parallel-size": 2, "--expert-model-parallel-size": 2}, 4),
        (
            {
                "--tensor-model-parallel-size": 2,
                "--expert-model-parallel-size": 2,
                "--expert-tensor-parallel-size": 1,
            },
            2,
        ),
        ({"--pipeline-model-parallel-size": 2, "--expert-model-parallel-size": 2}, 4),
        ({"--context-parallel-size": 3, "--expert-model-parallel-size": 2}, 6),
        ({"--expert-model-parallel-size": ["2", "4"]}, 4),
    ],
)
def test_layout_world_size(sizes, world):
    assert layout_world_size(sizes) == world


def test_default_number_of_processes_is_the_layout_s(dry_run):
    tokens = dry_run("--set", "--pipeline-model-parallel-size=2")
    assert tokens[tokens.index("--nproc-per-node") + 1] == "4"


def test_nodes_share_the_layout(dry_run):
    tokens = dry_run("--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "host:1234")
    own = tokens[: tokens.index("--num-layers")]
    assert own[own.index("--nproc-per-node") + 1] == "1"
    assert own[own.index("--node-rank") + 1] == "1"
    assert own[own.index("--rdzv-endpoint") + 1] == "host:1234"


def test_one_thread_a_process_without_gpu(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert choose_environment({}, gpu_count=0) == {"OMP_NUM_THREADS": "1"}
    assert choose_environment({}, gpu_count=8) == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert choose_environment({}, gpu_count=0) == {}


def test_one_cuda_queue_under_tensor_parallelism_on_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    wanted = choose_environment({"--tensor-model-parallel-size": 2}, gpu_count=8)
    assert wanted == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--set", "--seed=1", "--set", "--=2"], ["--set --=2", "give a flag"]),
        (["--set", "--seed=[1"], ["--set --seed=[1", "not valid YAML"]),
        (["--", "5"], ["'5'", "no flag"]),
        (["--no-llep", "--", "--moe-llep"], ["--no-llep", "--moe-llep", "drop one"]),
        (["--nproc", "0"], ["--nproc 0", "1 or more"]),
        (["--nnodes", "0"], ["--nnodes 0", "1 or more"]),
        (["--nnodes", "3"], ["--nnodes 3", "2 processes", "--nproc"]),
        (["--nnodes", "2"], ["--node-rank", "--rdzv-endpoint"]),
        (
            ["--nnodes", "2", "--node-rank", "2", "--rdzv-endpoint", "h:1"],
            ["--node-rank 2", "0 to 1"],
        ),
        (["--set", "--expert-model-parallel-size=1024"], ["1024 processes", "--nnodes", "--nproc"]),
        (["--set", "--expert-model-parallel-size=two"], ["--expert-model-parallel-size two"]),
        (["--script", "nowhere.py"], ["--script nowhere.py", "no such file"]),
        (["--train-iters", "5"], ["--train-iters"]),
    ],
)
def test_bad_options_are_errors_that_name_the_way_out(dry_run, capsys, argv, words):
    with pytest.raises(SystemExit) as exit_info:
        dry_run(*argv)
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("MODEL_ARGS: [", ["not valid YAML"]),
        ("LAYOUT_ARGS: {}", ["no MODEL_ARGS"]),
        ("- 1", ["no MODEL_ARGS"]),
        ("MODEL_ARGS: {}\nENV_VARS: {}", ["ENV_VARS", "LAYOUT_ARGS"]),
        ("MODEL_ARGS: 3", ["MODEL_ARGS must map"]),
        ("MODEL_ARGS:\n  num-layers: 3", ["'num-layers'", "--num-layers"]),
        ("MODEL_ARGS:\n  --a: 1\nLLEP_ARGS:\n  --a: 2", ["--a", "MODEL_ARGS", "LLEP_ARGS"]),
    ],
)
def test_bad_yaml_is_a_value_error(tmp_path, text, words):
    path = write_yaml(tmp_path, text)
    with pytest.raises(ValueError, match="configuration") as error:
        load_config(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_missing_file_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_config(tmp_path / "none.yaml")


def start(argv, **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        argv,
        env={**inherited, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(120)
def test_torchrun_script_runs_the_command_it_prints(script):
    runner = start(
        [ROOT / "pretrain/torchrun.sh", str(TINY), "--script", str(script), "--", "--seed", "7"]
    )
    out, err = runner.communicate(timeout=100)
    assert runner.returncode == 0, err
    printed, *said = out.splitlines()
    assert printed.startswith("OMP_NUM_THREADS=1 ")
    assert "--seed 7" in printed
    assert sorted(line.split()[:4] for line in said) == [["0", "2", "0", "1"], ["1", "2", "1", "1"]]
    for line in said:
        assert line.split()[4:] == shlex.split(printed.split(str(script))[1])


@pytest.fixture
def slurm(tmp_path):
    """Environment with stand-ins for Slurm: srun runs its command once a node, on this machine."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/bash\necho localhost\necho otherhost\n")
    (tools / "srun").write_text(
        "#!/bin/bash\n"
        'while [[ $1 == --* ]]; do echo "srun option $1"; shift; done\n'
        'for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done\n'
        'for pid in "${pids[@]}"; do wait "$pid" || exit 1; done\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "1",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "two",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }


@pytest.mark.timeout(120)
def test_slurm_script_starts_one_torchrun_a_node(script, slurm):
    runner = start(
        [ROOT / "pretrain/slurm.sh", str(TINY), "--script", str(script), "--", "--seed", "7"],
        MASTER_PORT=str(find_free_port()),
        SRUN_ARGS="--mem=0",
        **slurm,
    )
    out, err = runner.communicate(timeout=100)
    assert runner.returncode == 0, err
    assert "srun option --mem=0" in out
    # RANK, WORLD_SIZE, LOCAL_RANK of the two processes; the launcher's own lines begin otherwise.
    said = [line.split()[:3] for line in out.splitlines() if line[:1].isdigit()]
    assert sorted(said) == [["0", "2", "0"], ["1", "2", "0"]]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("starter", ["torchrun.sh", "slurm.sh"])
@pytest.mark.parametrize("name", ["sft", "rl"])
def test_fine_tuning_starts_the_script_of_the_configuration(starter, name, slurm):
    config = str(ROOT / "configs" / f"{name}-demo.yaml")
    options = ["--dry-run", *(["--nproc", "1"] if starter == "slurm.sh" else [])]
    runner = start([ROOT / "finetune" / starter, config, *options], **slurm)
    out, err = runner.communicate(timeout=50)
    assert runner.returncode == 0, err
    commands = [line for line in out.splitlines() if "torch.distributed.run" in line]
    assert len(commands) == (2 if starter == "slurm.sh" else 1)
    script = {"sft": "finetune/sft_gpt.py", "rl": "finetune/train_rl.py"}[name]
    assert all(script in command for command in commands)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("folder", ["pretrain", "finetune"])
def test_slurm_script_refuses_to_run_outside_slurm(folder):
    runner = start([ROOT / folder / "slurm.sh", str(TINY)], SLURM_JOB_ID="")
    _, err = runner.communicate(timeout=20)
    assert runner.returncode == 2
    assert "sbatch" in err


def test_a_pattern_of_layers_is_text(capsys):
    """YAML would take what begins with an asterisk for a reference."""
    config = str(ROOT / "configs" / "tiny-hybrid.yaml")
    launch.main([config, "--set", "--hybrid-layer-pattern=*E*E", "--dry-run"])
    command = shlex.split(capsys.readouterr().out)
    assert command[command.index("--hybrid-layer-pattern") + 1] == "*E*E"
    assert any(word.endswith("pretrain/pretrain_hybrid.py") for word in command)
    assert "--num-layers" not in command
