"""The data of pretraining: Megatron's GPT datasets, from its arguments."""

import json
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.training import get_args, get_tokenizer
from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig
from megatron.training.utils.common_utils import (
    get_blend_and_blend_per_split,
    is_first_or_last_pipeline_stage,
)

from megatron_llep.training.arguments import refuse_flags, require_data

# Fields of GPTDatasetConfig that Megatron's arguments hold under another name.
_ARGUMENT_OF = {
    "random_seed": "seed",
    "sequence_length": "seq_length",
    "path_to_cache": "data_cache_path",
    "create_attention_mask": "create_attention_mask_in_dataloader",
    "fast_cache_load": "dataloader_fast_cache_load",
    "defer_npy_index_mmap": "dataloader_defer_npy_index_mmap",
}
_SAME_NAME = (
    "split",
    "multiple_validation_sets",
    "full_validation",
    "num_dataset_builder_threads",
    "mmap_bin_files",
    "reset_position_ids",
    "reset_attention_mask",
    "eod_mask_loss",
    "object_storage_cache_path",
    "mid_level_dataset_surplus",
    "allow_ambiguous_pad_tokens",
)
_FIM_TOKENS = ("prefix", "middle", "suffix", "pad", "eod")
_FIM_RATES = ("fim_rate", "fim_spm_rate", "fim_split_sample", "fim_fragment_rate", "fim_no_prefix")
_PACKED = "packed sequences are not supported by this script; leave the flag out"
_UNSUPPORTED = {
    "sft": "--sft: this script trains on GPT data; leave the flag out, or use finetune/sft_gpt.py",
    "dataloader_inter_document_masking": f"--dataloader-inter-document-masking: {_PACKED}",
    "hybrid_context_parallel": f"--hybrid-context-parallel: {_PACKED}",
}


def check_pretraining(args: Namespace) -> None:
    """Refuse what pretraining cannot do; Megatron would train on mock data if no data is named.

    Raises:
        ValueError: names the flags to choose from.
    """
    refuse_flags(args, _UNSUPPORTED)
    if not args.mock_data:
        require_data(
            args,
            "the prefix of an indexed dataset (made by tools/prepare_corpus.py)",
            or_else=", or train on Megatron's mock data with --mock-data",
        )


def build_datasets(num_samples: list[int], vp_stage: int | None = None) -> list[Any]:
    """Build the training, validation and test sets: Megatron's dataset provider.

    Args:
        num_samples: of each of the three.
        vp_stage: index of the virtual pipeline stage, if there are several.
    """
    args = get_args()
    config = _dataset_config(args)
    kind: type[GPTDataset]
    if args.mock_data:
        kind = MockGPTDataset
    elif args.fim_data:
        kind = GPTFIMDataset
    else:
        kind = GPTDataset
    is_built_here = partial(_is_built_here, vp_stage=vp_stage)
    return BlendedMegatronDatasetBuilder(kind, num_samples, is_built_here, config).build()


# Megatron asks the provider whether it may be called on every rank.
build_datasets.is_distributed = True  # type: ignore[attr-defined]


def _is_built_here(vp_stage: int | None) -> bool:
    first_tp_rank = parallel_state.get_tensor_model_parallel_rank() == 0
    return first_tp_rank and is_first_or_last_pipeline_stage(vp_stage)


def _dataset_config(args: Namespace) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    settings = {field: getattr(args, argument) for field, argument in _ARGUMENT_OF.items()}
    settings |= {field: getattr(args, field) for field in _SAME_NAME}
    settings |= {"blend": blend, "blend_per_split": blend_per_split, "tokenizer": get_tokenizer()}
    if args.per_dataset_sequences_path is not None:
        text = Path(args.per_dataset_sequences_path).read_text()
        settings["sequences_per_dataset"] = json.loads(text)
    if not args.fim_data:
        return GPTDatasetConfig(**settings)
    tokens = {name: getattr(args, f"fim_{name}_token") for name in _FIM_TOKENS}
    rates = {field: getattr(args, field) for field in _FIM_RATES}
    return GPTFIMDatasetConfig(**settings, **rates, fim_extra_tokens=tokens)
