"""Packs of conversations as a dataset of Megatron's, so that its blends and splits apply.

Letters: S sequence length.
"""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from megatron.training import get_args, get_tokenizer, print_rank_0
from megatron.training.utils.common_utils import get_blend_and_blend_per_split

from megatron_llep.training.chat import Chat, build_chat
from megatron_llep.training.sft.packing import pack_epoch
from megatron_llep.training.sft.tokens import TokenFile, load_tokens


@dataclass(kw_only=True)
class SFTDatasetConfig(BlendedMegatronDatasetConfig):
    """Megatron's settings of a blend, and ours of a pack."""

    chat: Chat
    chat_key: tuple[Any, ...] = ()
    """What the tokens of a conversation depend on, for the cache."""
    packing: bool = True
    truncate: bool = False


class SFTDataset(MegatronDataset):
    """Packs of S tokens; epoch after epoch, each packed in another order."""

    config: SFTDatasetConfig

    def __init__(
        self,
        dataset: TokenFile,
        dataset_path: str | None,
        indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: SFTDatasetConfig,
    ) -> None:
        """As Megatron's builder calls it.

        Args:
            dataset: the whole file.
            dataset_path: its path.
            indices: of this split's conversations.
            num_samples: packs that will be asked for; None: one epoch.
            index_split: training, validation or test.
            config: of the dataset.

        Raises:
            ValueError: the split holds no conversation.
        """
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        if not len(indices):
            raise ValueError(
                f"--split {config.split}: leaves no conversation of {dataset_path} for "
                f"{index_split.name}; give that part more, or 0"
            )
        lines = np.unique(dataset.lines)[indices]
        examples = np.flatnonzero(np.isin(dataset.lines, lines))
        self._packs: list[np.ndarray] = []
        epoch = 0
        while epoch == 0 or len(self._packs) < (num_samples or 0):
            self._packs += self._pack(examples, epoch)
            epoch += 1

    def _pack(self, examples: np.ndarray, epoch: int) -> list[np.ndarray]:
        lengths = self.dataset.lengths[examples]
        if not self.config.packing:
            lengths = np.full_like(lengths, self.config.sequence_length)
        packs = pack_epoch(
            lengths, self.config.sequence_length, seed=self.config.random_seed, epoch=epoch
        )
        return [examples[pack] for pack in packs]

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: TokenFile) -> int:
        """Conversations in the file, which splits divide."""
        return len(np.unique(low_level_dataset.lines))

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: SFTDatasetConfig) -> TokenFile:
        """Tokenize the file."""
        tokens = load_tokens(
            dataset_path, config.chat, cache=config.path_to_cache, key=config.chat_key
        )
        tokens, notice = tokens.limit(config.sequence_length, truncate=config.truncate)
        if notice:
            print_rank_0(f"sft: {notice}")
        return tokens

    @staticmethod
    def _key_config_attributes() -> list[str]:
        """What tells two datasets apart, in Megatron's cache of blends."""
        return ["random_seed", "sequence_length", "split", "packing", "truncate", "chat_key"]

    def __len__(self) -> int:
        """At least the packs that were asked for."""
        return len(self._packs)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        """One pack, under the names that Megatron's batches have.

        Returns:
            tokens, labels, position_ids: int64 [S]; loss_mask: fp32 [S], 1 for answers;
            cu_seqlens: int32 [S + 1], where segments start, then S up to the end (padding is a
            segment of its own); max_seqlen: int32 [], length of the longest.
        """
        S = self.config.sequence_length
        file: TokenFile = self.dataset
        spans = [slice(file.starts[i], file.ends[i]) for i in self._packs[idx]]
        lengths = [span.stop - span.start for span in spans]
        lengths.append(S - sum(lengths))
        pad, num_pads = self.config.chat.pad_id, lengths[-1]

        def join(values: np.ndarray, fill: int) -> torch.Tensor:
            parts = [values[span] for span in spans]
            return torch.from_numpy(np.concatenate([*parts, np.full(num_pads, fill)]))

        cu_seqlens = torch.full((S + 1,), S, dtype=torch.int32)
        cu_seqlens[: len(lengths) + 1] = torch.tensor([0, *lengths]).cumsum(0)
        return {
            "tokens": join(file.inputs, pad).long(),
            "labels": join(file.labels, pad).long(),
            "loss_mask": join(file.trained, 0).float(),
            "position_ids": torch.cat([torch.arange(length) for length in lengths]),
            "cu_seqlens": cu_seqlens,
            "max_seqlen": torch.tensor(max(lengths), dtype=torch.int32),
        }


def build_sft_datasets(num_samples: list[int], vp_stage: int | None = None) -> list[Any]:
    """Build the training, validation and test sets: Megatron's dataset provider.

    Args:
        num_samples: of each of the three.
        vp_stage: index of the virtual pipeline stage, if there are several.

    Raises:
        ValueError: names flag, or file and line, and the way out.
    """
    config = _dataset_config(get_args())
    builder = BlendedMegatronDatasetBuilder(SFTDataset, num_samples, _is_built_here, config)
    return builder.build()


# Megatron asks the provider whether it may be called on every rank.
build_sft_datasets.is_distributed = True  # type: ignore[attr-defined]


def _is_built_here() -> bool:
    # On all stages: each needs to know where segments start.
    return parallel_state.get_tensor_model_parallel_rank() == 0


def _dataset_config(args: Namespace) -> SFTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    tokenizer = get_tokenizer()
    return SFTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=None if blend_per_split else args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        chat=build_chat(args, tokenizer),
        chat_key=(args.tokenizer_type, args.tokenizer_model, tokenizer.chat_template),
        packing=not args.sft_no_packing,
        truncate=args.sft_truncate,
    )
