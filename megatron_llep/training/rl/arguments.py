"""The command line of GRPO: flags beyond Megatron's `--grpo-*` and `--rl-*`, and refusals."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import pairwise

from megatron_llep.compat.rl_flags import add_group
from megatron_llep.training.arguments import refuse_flags
from megatron_llep.training.chat import check_chat_arguments

ROUTING_REPLAY = ("none", "R2", "R3")

_WHOLE_MODEL = "an answer is generated with the whole model on every rank; use 1"
_LEAVE_OUT = "is not supported by this script; leave the flag out"
# By the name in Megatron's arguments: what a value of more than one does not go with.
_SIZES = {
    "pipeline_model_parallel_size": f"{_WHOLE_MODEL}, with more tensor or expert parallelism",
    "context_parallel_size": f"{_WHOLE_MODEL}, with more tensor or expert parallelism",
}
_REFUSED = {
    "mtp_num_layers": "--mtp-num-layers: multi-token prediction " + _LEAVE_OUT,
    "skip_train": "--skip-train: there would be nothing to train; leave the flag out",
    "rl_use_sequence_packing": "--rl-use-sequence-packing: packing of rollouts " + _LEAVE_OUT,
    "rl_partial_rollouts": "--rl-partial-rollouts: " + _LEAVE_OUT,
    "rl_generation_lag": "--rl-generation-lag: " + _LEAVE_OUT,
    "rl_inference_logprobs_is_correction": "--rl-inference-logprobs-is-correction: it "
    + _LEAVE_OUT
    + "; the old policy's logprobs are computed by the model that trains",
    "rl_offload_optimizer_during_inference": "--rl-offload-optimizer-during-inference: it "
    + _LEAVE_OUT,
    "rl_profile": "--rl-profile: it " + _LEAVE_OUT + "; seconds are logged as rl/*_seconds",
    "langrl_env_config": "--langrl-env-config: it " + _LEAVE_OUT + "; a task is --rl-task",
    "grpo_filter_groups_with_same_reward": "--grpo-filter-groups-with-same-reward: it "
    + _LEAVE_OUT
    + "; the advantage of such a group is 0 anyway",
    "grpo_entropy_term_weight": "--grpo-entropy-term-weight: an entropy term " + _LEAVE_OUT,
    "rl_inference_tensor_model_parallel_size": "--rl-inference-tensor-model-parallel-size: the "
    "model that trains also answers; leave the flag out",
    "rl_inference_pipeline_model_parallel_size": "--rl-inference-pipeline-model-parallel-size: "
    "the model that trains also answers; leave the flag out",
    "rl_inference_expert_model_parallel_size": "--rl-inference-expert-model-parallel-size: the "
    "model that trains also answers; leave the flag out",
    "rl_inference_expert_tensor_model_parallel_size": "--rl-inference-expert-tensor-model-"
    "parallel-size: the model that trains also answers; leave the flag out",
    "overlap_moe_expert_parallel_comm": "--overlap-moe-expert-parallel-comm: it " + _LEAVE_OUT,
    "flash_decode": "--flash-decode: it " + _LEAVE_OUT,
    "use_megatron_fsdp": "--use-megatron-fsdp: it " + _LEAVE_OUT + "; use Megatron's DDP",
    "use_torch_fsdp2": "--use-torch-fsdp2: it " + _LEAVE_OUT + "; use Megatron's DDP",
    "step_batch_size_schedule": "--step-batch-size-schedule: a rollout is a whole number of "
    "global batches; give a fixed --global-batch-size",
}


def add_rl_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags that Megatron lacks."""
    group = add_group(parser, "reinforcement learning on a task")
    group.add_argument(
        "--rl-task",
        metavar="PLACE:FUNCTION",
        help="Function that returns the task, prompts and reward: MODULE:FUNCTION or "
        "FILE.py:FUNCTION.",
    )
    group.add_argument(
        "--rl-max-new-tokens", type=int, default=128, help="An answer is cut off there."
    )
    group.add_argument(
        "--rl-generation-batch-size",
        dest="rl_answers_at_a_time",
        metavar="ANSWERS",
        type=int,
        help="Most answers a rank generates at a time, which bounds the memory of keys and values. "
        "Default: all of a rollout.",
    )
    group.add_argument(
        "--rl-routing-replay",
        choices=ROUTING_REPLAY,
        default="none",
        help="Whose routing training repeats. none: its own. R2: that of the forward that computed "
        "the old policy's logprobs. R3: that of the rollout.",
    )
    return parser


def find_rl_flags(argv: Sequence[str]) -> list[str]:
    """Megatron's flags without which its loop does not run GRPO, as far as they are not given."""
    given = {word.partition("=")[0] for word in argv}
    added = [] if "--perform-rl-step" in given else ["--perform-rl-step"]
    if "--eval-iters" not in given:
        added += ["--eval-iters", "0"]
    if _replays(argv) and "--moe-enable-routing-replay" not in given:
        added.append("--moe-enable-routing-replay")
    return added


def check_rl_arguments(args: Namespace) -> None:
    """Check arguments as given.

    Raises:
        ValueError: what cannot be done; names the flag, its value and the way out.
    """
    refuse_flags(args, _REFUSED)
    for name, reason in _SIZES.items():
        if getattr(args, name) > 1:
            raise ValueError(f"{_flag(name)} {getattr(args, name)}: {reason}")
    if args.cuda_graph_impl not in (None, "none"):
        raise ValueError(
            f"--cuda-graph-impl {args.cuda_graph_impl}: answers differ in length, and graphs do "
            "not; leave the flag out"
        )
    check_chat_arguments(args)
    _check_policy(args)
    if args.ckpt_step is not None and args.pretrained_checkpoint is not None:
        raise ValueError(
            f"--ckpt-step {args.ckpt_step}: Megatron would look for that step in "
            "--pretrained-checkpoint too; to go on from it, write its number into "
            "latest_checkpointed_iteration.txt of --load and leave the flag out"
        )
    _check_batches(args)
    _check_lengths(args)
    if args.eval_iters:
        raise ValueError(
            f"--eval-iters {args.eval_iters}: Megatron would read a validation and a test set that "
            "RL does not have; leave the flag out: --rl-prompts-per-eval held-out prompts are "
            "answered every --eval-interval steps"
        )
    if args.rl_routing_replay != "none" and not args.num_experts:
        raise ValueError(
            f"--rl-routing-replay {args.rl_routing_replay}: the model has no experts to route to; "
            "leave the flag out"
        )


def _check_policy(args: Namespace) -> None:
    if args.rl_default_temperature != 1:
        raise ValueError(
            f"--rl-default-temperature {args.rl_default_temperature}: the policy that is trained "
            "is that of temperature 1, and answers of another one are not its own; use 1"
        )
    if args.rl_default_top_p not in (0, 1):
        raise ValueError(
            f"--rl-default-top-p {args.rl_default_top_p}: answers must be those of the policy that "
            "is trained, which has no such limit; leave the flag out"
        )
    if args.rl_default_top_k > 0:
        raise ValueError(
            f"--rl-default-top-k {args.rl_default_top_k}: answers must be those of the policy that "
            "is trained, which has no such limit; leave the flag out"
        )
    for name in ("hidden_dropout", "attention_dropout"):
        if getattr(args, name):
            raise ValueError(
                f"{_flag(name)} {getattr(args, name)}: the policy that is trained must be the one "
                f"that answered, which has no dropout; give {_flag(name)} 0"
            )
    if args.grpo_kl_beta < 0:
        raise ValueError(f"--grpo-kl-beta {args.grpo_kl_beta}: give 0 or more")
    has_reference = args.pretrained_checkpoint or args.hf_load
    if args.grpo_kl_beta > 0 and not has_reference:
        raise ValueError(
            f"--grpo-kl-beta {args.grpo_kl_beta}: there is no reference policy to stay near, the "
            "same before and after a resume; give it with --pretrained-checkpoint FOLDER or "
            "--hf-load FOLDER, from which training then also starts, or train without with "
            "--grpo-kl-beta 0"
        )


def _check_batches(args: Namespace) -> None:
    prompts, group = args.grpo_prompts_per_step, args.grpo_group_size
    if group < 2:
        raise ValueError(
            f"--grpo-group-size {group}: an answer is judged against others to its prompt; use 2 "
            "or more"
        )
    if args.grpo_iterations < 1:
        raise ValueError(f"--grpo-iterations {args.grpo_iterations}: use 1 or more")
    ranks = args.world_size // args.tensor_model_parallel_size  # data-parallel ones
    if prompts < 1 or prompts % max(ranks, 1):
        raise ValueError(
            f"--grpo-prompts-per-step {prompts}: give a multiple of the {ranks} data-parallel ranks"
        )
    batch = args.global_batch_size or (args.micro_batch_size or 1) * ranks  # Megatron's default
    if prompts * group % batch:
        raise ValueError(
            f"--global-batch-size {batch}: a rollout of {prompts} prompts x {group} answers is not "
            "a whole number of batches; give a divisor of --grpo-prompts-per-step times "
            "--grpo-group-size"
        )
    if batch % ((args.micro_batch_size or 1) * max(ranks, 1)):
        raise ValueError(
            f"--global-batch-size {batch}: give a multiple of --micro-batch-size "
            f"{args.micro_batch_size} times the {ranks} data-parallel ranks"
        )
    steps = prompts * group * args.grpo_iterations // batch
    for name in ("save_interval", "exit_interval"):
        interval = getattr(args, name)
        if interval and interval % steps:
            raise ValueError(
                f"{_flag(name)} {interval}: a rollout is trained on for {steps} steps "
                "(--grpo-prompts-per-step x --grpo-group-size x --grpo-iterations / "
                "--global-batch-size) and is not part of a checkpoint; give a multiple of that"
            )
    if args.rl_answers_at_a_time is not None and args.rl_answers_at_a_time < 1:
        raise ValueError(
            f"--rl-generation-batch-size {args.rl_answers_at_a_time}: give 1 or more, or leave "
            "it out"
        )


def _check_lengths(args: Namespace) -> None:
    new, length = args.rl_max_new_tokens, args.seq_length
    if new < 1:
        raise ValueError(f"--rl-max-new-tokens {new}: give 1 or more")
    if length is not None and new >= length:
        raise ValueError(
            f"--rl-max-new-tokens {new}: with --seq-length {length} no token is left for the "
            "prompt; give fewer, or a longer --seq-length"
        )


def _replays(argv: Sequence[str]) -> bool:
    flag = "--rl-routing-replay"
    values = [word.partition("=")[2] for word in argv if word.startswith(flag + "=")]
    values += [after for word, after in pairwise(argv) if word == flag]
    return values[-1:] not in ([], ["none"])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
