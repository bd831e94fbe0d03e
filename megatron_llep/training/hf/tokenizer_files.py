"""The tokenizer of a Hugging Face folder: whether there is one, and whether it fits the model."""

import json
from pathlib import Path

# Which files make a tokenizer; transformers needs one of them.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def has_tokenizer(folder: Path) -> bool:
    """Whether transformers' AutoTokenizer finds one there."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def check_vocabulary(tokenizer: Path, vocab_size: int, config: Path) -> None:
    """Refuse a tokenizer with tokens that the model's embedding has no row for.

    Args:
        tokenizer: a folder, or a name on the hub, of which nothing is known here.
        vocab_size: rows of the embedding.
        config: where that number is from.

    Raises:
        ValueError: names the file, both numbers and remedy.
    """
    path = tokenizer / "tokenizer.json"
    if not path.is_file():
        return
    try:
        largest = _largest_token(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--tokenizer-model {tokenizer}: {path} is no tokenizer") from error
    if largest >= vocab_size:
        raise ValueError(
            f"--tokenizer-model {tokenizer}: its largest token is {largest}, and {config} has "
            f"vocab_size {vocab_size}; take the tokenizer that the model was made with"
        )


def _largest_token(content: dict) -> int:
    added = [token["id"] for token in content.get("added_tokens") or []]
    vocabulary = content["model"].get("vocab") or {}
    if isinstance(vocabulary, dict):
        return max([*vocabulary.values(), *added], default=-1)
    return max([len(vocabulary) - 1, *added], default=-1)  # unigram: a list, in order of tokens
