"""The flags of supervised fine-tuning, and what it refuses."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.training.utils.common_utils import get_blend_and_blend_per_split

from megatron_llep.compat.refusals import refuse_packs
from megatron_llep.training.arguments import refuse_flags, require_data
from megatron_llep.training.chat import check_chat_arguments
from megatron_llep.training.sft.answers import AnswerCheck
from megatron_llep.training.sft.conversations import read_conversations

_BY_TOKEN = "--calculate-per-token-loss"
_UNSUPPORTED = {
    "mock_data": "--mock-data: there are no mock conversations; make some with "
    "tools/make_conversations.py and give --data-path",
    "fim_data": "--fim-data: conversations have no middle to fill in; leave the flag out",
    "mtp_num_layers": "--mtp-num-layers: multi-token prediction would reach across the "
    "conversations of a pack; leave the flag out",
    "dataloader_inter_document_masking": "--dataloader-inter-document-masking: conversations are "
    "kept apart anyway; leave the flag out",
    "hybrid_context_parallel": "--hybrid-context-parallel: not supported with conversations; leave "
    "the flag out",
}


def add_sft_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags to a parser."""
    add = parser.add_argument_group("supervised fine-tuning").add_argument
    add(
        "--sft-no-packing",
        action="store_true",
        help="One conversation a sequence, padded, instead of as many as fit.",
    )
    add(
        "--sft-truncate",
        action="store_true",
        help="Cut conversations that are longer than --seq-length at their end, instead of "
        "refusing them.",
    )
    add(
        "--sft-eval-answers",
        type=int,
        default=0,
        metavar="N",
        help="At each evaluation, let the model answer the last turn of the first N validation "
        "conversations, greedily, and log the share that it answers exactly as they do: "
        "`exact match`. Default: 0, none.",
    )
    add(
        "--sft-max-new-tokens",
        type=int,
        default=64,
        metavar="N",
        help="Most tokens of such an answer.",
    )
    return parser


def flags_of_sft(argv: Sequence[str]) -> list[str]:
    """What fine-tuning on answers needs, unless it is given: a loss that weighs tokens alike.

    Micro-batches differ in how many answer tokens they hold; averaged one by one, a token in a
    micro-batch of few answers would weigh more.
    """
    return [] if _BY_TOKEN in argv else [_BY_TOKEN]


def check_sft(args: Namespace) -> None:
    """Check arguments as given, and the first line of each file.

    Megatron's own `--sft` is accepted: the flag means what this script does.

    Raises:
        ValueError: names flag, value and remedy.
    """
    refuse_flags(args, _UNSUPPORTED)
    require_data(args, "a JSONL file of conversations")
    check_chat_arguments(args)
    if args.split is None and get_blend_and_blend_per_split(args)[0] is not None:
        raise ValueError(
            "--split is missing: give the shares of training, validation and test, such as 98,2,0"
        )
    if args.context_parallel_size > 1:
        raise ValueError(
            f"--context-parallel-size {args.context_parallel_size}: not supported with packed "
            "conversations; leave the flag out"
        )
    refuse_packs(args)
    pipeline = args.pipeline_model_parallel_size
    for name in ("micro_batch_size", "eval_micro_batch_size"):
        size = getattr(args, name)
        if pipeline > 1 and (size or 1) > 1:
            raise ValueError(
                f"--{name.replace('_', '-')} {size}: with --pipeline-model-parallel-size "
                f"{pipeline} a micro-batch is one pack; give 1, and a longer --seq-length"
            )
    if args.sft_eval_answers and pipeline > 1:
        raise ValueError(
            f"--sft-eval-answers {args.sft_eval_answers}: a model in "
            f"--pipeline-model-parallel-size {pipeline} stages cannot generate; leave the flag out"
        )
    if args.sft_eval_answers and not args.eval_iters:
        raise ValueError(
            f"--sft-eval-answers {args.sft_eval_answers}: nothing is evaluated with --eval-iters "
            f"{args.eval_iters}; give 1 or more"
        )
    for path in _list_files(args):
        next(read_conversations(Path(path)))


def options_of_sft(args: Namespace) -> dict[str, Any]:
    """What Megatron's loop is told besides its flags, from validated arguments.

    Takes back `--sft`: with it the loop would average evaluation losses over micro-batches, though
    training weighs tokens.
    """
    if args.sft:
        args.sft = False
        if int(os.environ.get("RANK", "0")) == 0:
            print("--sft: is what this script does; evaluation weighs tokens alike", flush=True)
    return {"non_loss_data_func": AnswerCheck()} if args.sft_eval_answers else {}


def _list_files(args: Namespace) -> list[str]:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return [path for each in (blend, *(blend_per_split or ())) if each for path in each[0]]
