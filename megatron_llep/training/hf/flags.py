"""Completes a command line with the shape that a Hugging Face folder's `config.json` gives.

Megatron's own parser reads both the user's flags and those of the folder, so that a flag's types,
defaults and spellings are known in one place only.
"""

import argparse
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.training.arguments import add_megatron_arguments

from megatron_llep.training.hf.arguments import add_hf_arguments, hf_source
from megatron_llep.training.hf.config_file import HFConfig, read_config
from megatron_llep.training.hf.shape import Shape, Value, padded_vocab_size, shape_of
from megatron_llep.training.hf.tokenizer_files import check_vocabulary, has_tokenizer

_NOT_GIVEN = object()

COMPARED = shlex.split("""
    --num-layers --hidden-size --ffn-hidden-size --num-attention-heads --kv-channels
    --group-query-attention --num-query-groups --softmax-type --window-size --window-attn-skip-freq
    --qk-layernorm --qk-l2-norm --add-qkv-bias --disable-bias-linear --attention-output-gate
    --normalization --norm-epsilon --apply-layernorm-1p --swiglu --quick-geglu --glu-linear-offset
    --activation-func-clamp-value --untie-embeddings-and-output-weights --padded-vocab-size
    --position-embedding-type --rope-type --rotary-base --rotary-percent --rotary-interleaved
    --rotary-scaling-factor --rotary-seq-len-interpolation-factor --use-rope-scaling --mscale
    --mscale-all-dim --yarn-original-max-position-embeddings --yarn-beta-fast --yarn-beta-slow
    --no-yarn-correction-range-round-to-int --no-rope-freq
    --num-experts --moe-router-topk --moe-ffn-hidden-size --moe-layer-freq --moe-latent-size
    --moe-shared-expert-intermediate-size --moe-shared-expert-gate --moe-router-score-function
    --moe-router-pre-softmax --moe-router-topk-scaling-factor --moe-router-num-groups
    --moe-router-group-topk --moe-router-enable-expert-bias
    --multi-latent-attention --q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim
    --v-head-dim --experimental-attention-variant
""")
_DESTINATION = {
    "--disable-bias-linear": "add_bias_linear",
    "--norm-epsilon": "layernorm_epsilon",
    "--apply-layernorm-1p": "layernorm_zero_centered_gamma",
    "--no-yarn-correction-range-round-to-int": "yarn_correction_range_round_to_int",
    "--no-rope-fusion": "apply_rope_fusion",
    "--no-bias-dropout-fusion": "bias_dropout_fusion",
}
_PER_LAYER = ("--moe-layer-freq", "--window-attn-skip-freq")


def flags_from_hf(argv: Sequence[str]) -> list[str]:
    """The flags to add to a command line that names a Hugging Face folder.

    Args:
        argv: the user's flags, without the program's name.

    Returns:
        The shape, and the folder's tokenizer, as far as the user has not given them; nothing
        where neither `--hf-load` nor `--hf-config` is given.

    Raises:
        ValueError: the folder has no usable `config.json`, or a flag of the user contradicts it;
            names flag, both values and remedy.
    """
    if not any(word.startswith(("--hf-load", "--hf-config")) for word in argv):
        return []
    parser = _Parser()
    given = _Given(parser.parse(argv))
    source = hf_source(given.get("--hf-load"), given.get("--hf-config"))
    if source is None:
        return []
    flag, folder = source
    config = read_config(flag, folder)
    shape = shape_of(config)
    flags = shape.flags | {
        "--padded-vocab-size": padded_vocab_size(
            shape.vocab_size, given.get("--tensor-model-parallel-size", 1)
        )
    }
    expected = parser.defaults | parser.parse(format_flags(flags))
    _refuse_contradictions(given, flags, expected, shape, config)
    _check_positions(given, shape, config)
    wanted = flags | shape.defaults | _tokenizer(given, folder)
    _check_tokenizer(given, wanted, shape, config)
    return format_flags({name: v for name, v in wanted.items() if not given.has(name)})


def format_flags(flags: Mapping[str, Value]) -> list[str]:
    """Words of a command line."""
    words = []
    for flag, value in flags.items():
        words += [flag] if value is True else [flag, str(value)]
    return words


class _Parser:
    """Megatron's, which tells what is on a command line from what is by default."""

    def __init__(self) -> None:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        self._parser = add_hf_arguments(add_megatron_arguments(parser))
        self.defaults = vars(self._parser.parse_args([]))
        self._parser.set_defaults(**dict.fromkeys(self.defaults, _NOT_GIVEN))

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """What these words give, and nothing else."""
        given = vars(self._parser.parse_known_args(list(words))[0])
        return {name: value for name, value in given.items() if value is not _NOT_GIVEN}


@dataclass(frozen=True)
class _Given:
    """What the user has given."""

    values: Mapping[str, Any]

    def get(self, flag: str, default: Any = None) -> Any:
        return self.values.get(_destination(flag), default)

    def has(self, flag: str) -> bool:
        return _destination(flag) in self.values


def _destination(flag: str) -> str:
    return _DESTINATION.get(flag, flag.removeprefix("--").replace("-", "_"))


def _refuse_contradictions(
    given: _Given,
    flags: Mapping[str, Value],
    expected: Mapping[str, Any],
    shape: Shape,
    config: HFConfig,
) -> None:
    """Compare what Megatron's parser makes of the user's flags and of the folder's."""
    for flag in COMPARED:
        if not given.has(flag) or flag in shape.defaults:
            continue
        theirs, ours = given.get(flag), expected[_destination(flag)]
        if _comparable(flag, theirs, expected) == _comparable(flag, ours, expected):
            continue
        if isinstance(theirs, bool):
            raise ValueError(
                f"{flag}: the model of {config.path} has {'' if flag in flags else 'not '}that "
                "setting; leave the flag out, or name another folder"
            )
        raise ValueError(
            f"{flag} {_text(theirs)}: {config.path} gives {_text(ours)}; leave the flag out, or "
            "name another folder"
        )


def _comparable(flag: str, value: Any, expected: Mapping[str, Any]) -> Any:
    """The value; a frequency as a value for each layer, by Megatron's two rules."""
    if flag not in _PER_LAYER or value is None:
        return value
    layers = range(expected["num_layers"])
    if not isinstance(value, int):
        return [bool(of_layer) for of_layer in value]
    if flag == "--moe-layer-freq":
        return [layer % value == 0 for layer in layers]
    return [(layer + 1) % value != 0 for layer in layers]


def _text(value: object) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ",".join(map(str, value))
    return "nothing like it" if value is None else str(value)


def _check_positions(given: _Given, shape: Shape, config: HFConfig) -> None:
    length, most = given.get("--seq-length", 0), shape.defaults["--max-position-embeddings"]
    if length > int(most) and not given.has("--max-position-embeddings"):
        raise ValueError(
            f"--seq-length {length}: {config.path} has max_position_embeddings {most}; shorten "
            f"the sequence, or go beyond it with --max-position-embeddings {length}"
        )


def _tokenizer(given: _Given, folder: Path) -> dict[str, Value]:
    """The folder's tokenizer, where the user names no other."""
    kind = given.get("--tokenizer-type", "HuggingFaceTokenizer")
    if kind != "HuggingFaceTokenizer" or not has_tokenizer(folder):
        return {}
    if given.has("--tokenizer-model") and not given.has("--tokenizer-type"):
        return {}
    return {"--tokenizer-type": kind, "--tokenizer-model": str(folder)}


def _check_tokenizer(
    given: _Given, wanted: Mapping[str, Value], shape: Shape, config: HFConfig
) -> None:
    size = given.get("--vocab-size")
    if size is not None and size > shape.vocab_size:
        raise ValueError(
            f"--vocab-size {size}: {config.path} has vocab_size {shape.vocab_size}; leave the "
            "flag out, or name another folder"
        )
    kind = given.get("--tokenizer-type", wanted.get("--tokenizer-type"))
    model = given.get("--tokenizer-model", wanted.get("--tokenizer-model"))
    if kind == "HuggingFaceTokenizer" and model is not None:
        check_vocabulary(Path(str(model)), shape.vocab_size, config.path)
