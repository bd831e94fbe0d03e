"""Text into Megatron's indexed dataset: documents, how they become ids, and the two files."""

import os
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)
from tqdm import tqdm

BYTE_EOD = 256
SKIPPED = frozenset(
    # pydoc_data holds the prose of --builtin python-docs, which would mix the two domains.
    {"__pycache__", "dist-packages", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
)


@dataclass(frozen=True)
class Document:
    """One document: where it comes from and how to read its bytes."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Encoding:
    """How text becomes ids.

    `encode` takes a document and returns ids, an integer array [tokens]; `eod` ends a document
    (None: the tokenizer has no such id); `flags` are what training on the ids needs.
    """

    encode: Callable[[Document, bytes], np.ndarray]
    eod: int | None
    vocab_size: int
    flags: str


# Every byte is a token: ids 0..255 are the bytes.
BYTES = Encoding(
    encode=lambda document, text: np.frombuffer(text, dtype=np.uint8),
    eod=BYTE_EOD,
    vocab_size=BYTE_EOD + 1,
    flags=f"--tokenizer-type NullTokenizer --vocab-size {BYTE_EOD + 1}",
)


@dataclass(frozen=True)
class CorpusSummary:
    """What was written."""

    documents: int
    text_bytes: int
    tokens: int


def find_documents(inputs: Sequence[Path], globs: Sequence[str]) -> list[Document]:
    """List the files of inputs in a fixed order.

    Inputs keep their order; inside a folder, files that match any of globs (at any depth) are
    sorted by their path. A file that is named itself need not match.

    Raises:
        ValueError: an input does not exist, or a folder has no matching file.
    """
    documents = []
    for path in inputs:
        if not path.exists():
            raise ValueError(f"input {path}: no such file or folder")
        found = {path}
        if path.is_dir():
            found = {file for pattern in globs for file in path.rglob(pattern) if file.is_file()}
        if not found:
            raise ValueError(
                f"input {path}: no file matches --document-glob {' '.join(globs)}; "
                "give a pattern that does"
            )
        documents += _read_sorted(path, found)
    return documents


def _read_sorted(folder: Path, files: Iterable[Path]) -> list[Document]:
    files = sorted(files, key=lambda file: file.relative_to(folder).as_posix())
    return [Document(str(file), file.read_bytes) for file in files]


def load_python_docs() -> list[Document]:
    """List the language reference's topics that Python's `help()` shows, one document each.

    Raises:
        ValueError: this Python was installed without `pydoc_data.topics`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            "--builtin python-docs: this Python has no pydoc_data.topics; "
            "use another installation of Python, or --builtin python-stdlib"
        ) from error
    return [Document(f"topic {name}", topics[name].encode) for name in sorted(topics)]


def load_python_stdlib() -> list[Document]:
    """List the standard library's Python files, without tests and installed packages.

    Raises:
        ValueError: this Python was installed without its library's sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        file for file in root.rglob("*.py") if SKIPPED.isdisjoint(file.relative_to(root).parts)
    ]
    if not files:
        raise ValueError(f"--builtin python-stdlib: no .py file under {root}; give input files")
    return _read_sorted(root, files)


BUILTINS = {"python-docs": load_python_docs, "python-stdlib": load_python_stdlib}


def make_hugging_face_encoding(name_or_path: str) -> Encoding:
    """Wrap a Hugging Face tokenizer; no special tokens are added to a document.

    Raises:
        ValueError: transformers is missing, or it cannot load the tokenizer.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(
            f"--tokenizer {name_or_path} needs the transformers package: "
            "pip install 'megatron-llep[hf]', or leave --tokenizer out to train on bytes"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer {name_or_path} cannot be loaded: {error}") from error

    def encode(document: Document, text: bytes) -> np.ndarray:
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{document.name} is not UTF-8 text, which --tokenizer needs: convert it, leave "
                "it out with --document-glob, or leave --tokenizer out to train on bytes"
            ) from error
        return np.asarray(tokenizer.encode(decoded, add_special_tokens=False), dtype=np.int64)

    return Encoding(
        encode=encode,
        eod=tokenizer.eos_token_id,
        vocab_size=len(tokenizer),
        flags=f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {name_or_path}",
    )


def cut_text(text: bytes, limit: int) -> bytes:
    """Return the longest prefix of at most limit bytes that ends between UTF-8 characters."""
    if len(text) <= limit:
        return text
    while limit > 0 and text[limit] & 0xC0 == 0x80:  # a byte inside a character
        limit -= 1
    return text[:limit]


def read_texts(
    documents: Sequence[Document], max_bytes: int | None
) -> Iterator[tuple[Document, bytes]]:
    """Yield the documents that are not empty, with their text, up to max_bytes in all."""
    left = sys.maxsize if max_bytes is None else max_bytes
    # A bar shows up only when reading takes more than a few seconds.
    for document in tqdm(documents, desc="documents", unit="doc", delay=3):
        whole = document.read()
        if text := cut_text(whole, left):
            yield document, text
        left -= len(whole)
        if left <= 0:
            return


def write_corpus(
    documents: Sequence[Document],
    encoding: Encoding,
    output_prefix: Path,
    *,
    append_eod: bool = False,
    max_bytes: int | None = None,
) -> CorpusSummary:
    """Write PREFIX.bin and PREFIX.idx; an existing pair is replaced only when all went well.

    Args:
        documents: in the order they are written.
        encoding: how text becomes ids.
        output_prefix: path of the two files without their suffixes; its folder is made.
        append_eod: end every document with the encoding's end-of-document id.
        max_bytes: stop after this many bytes of text; the last document may be cut, between
            characters.

    Raises:
        ValueError: nothing to write, the tokenizer has no end-of-document id, or text that it
            cannot read.
    """
    if append_eod and encoding.eod is None:
        raise ValueError("--append-eod: the tokenizer has no end-of-sequence id; leave it out")
    output_prefix.parent.mkdir(parents=True, exist_ok=True)
    eod = np.array([encoding.eod] if append_eod else [], dtype=np.int64)
    count = text_bytes = tokens = 0
    with tempfile.TemporaryDirectory(dir=output_prefix.parent) as folder:
        files = (get_bin_path(f"{folder}/partial"), get_idx_path(f"{folder}/partial"))
        builder = IndexedDatasetBuilder(files[0], dtype=DType.optimal_dtype(encoding.vocab_size))
        for document, text in read_texts(documents, max_bytes):
            ids = np.concatenate([encoding.encode(document, text), eod])
            if ids.size == 0:
                continue
            builder.add_document(ids, [ids.size])
            count, text_bytes, tokens = count + 1, text_bytes + len(text), tokens + ids.size
        builder.finalize(files[1])
        if count == 0:
            raise ValueError("the inputs hold no text; give files that are not empty")
        for file, path in zip(files, (get_bin_path, get_idx_path), strict=True):
            os.replace(file, path(str(output_prefix)))
    return CorpusSummary(documents=count, text_bytes=text_bytes, tokens=tokens)
