"""Turn text into Megatron's indexed dataset: PREFIX.bin and PREFIX.idx, one document a file.

    python tools/prepare_corpus.py --builtin python-docs --append-eod --output-prefix data/docs
    python tools/prepare_corpus.py --builtin python-stdlib --max-bytes 4000000 --append-eod \
        --output-prefix data/code
    python tools/prepare_corpus.py notes/ book.txt --document-glob '*.md' --output-prefix data/mine
    python tools/prepare_corpus.py notes/ --tokenizer Qwen/Qwen3-30B-A3B --output-prefix data/mine

Without --tokenizer every byte is a token, with its value as id, and id 256 ends a document; train
on that with `--tokenizer-type NullTokenizer --vocab-size 257` (Megatron's NullTokenizer takes the
last id of the vocabulary as end of document). With --tokenizer the text is read as UTF-8 and
training needs `--tokenizer-type HuggingFaceTokenizer --tokenizer-model NAME_OR_PATH`. The last
line printed says which flags fit. The same input gives the same bytes; of the builtin sources the
text depends on the version of Python.
"""

import argparse
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
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
BYTE_VOCAB_SIZE = 257
DEFAULT_GLOBS = ("*.txt", "*.md", "*.rst")
SKIPPED_STDLIB_FOLDERS = frozenset(
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
        if path.is_dir():
            found = {file for pattern in globs for file in path.rglob(pattern) if file.is_file()}
            if not found:
                raise ValueError(
                    f"input {path}: no file matches --document-glob {' '.join(globs)}; "
                    "give a pattern that does"
                )
            files = sorted(found, key=lambda file: file.relative_to(path).as_posix())
        elif path.is_file():
            files = [path]
        else:
            raise ValueError(f"input {path}: no such file or folder")
        documents += [Document(str(file), file.read_bytes) for file in files]
    return documents


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
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_STDLIB_FOLDERS]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise ValueError(f"--builtin python-stdlib: no .py file under {root}; give input files")
    files.sort(key=lambda file: file.relative_to(root).as_posix())
    return [Document(str(file), file.read_bytes) for file in files]


BUILTINS: dict[str, Callable[[], list[Document]]] = {
    "python-docs": load_python_docs,
    "python-stdlib": load_python_stdlib,
}


def make_byte_encoding() -> Encoding:
    """Every byte is a token: ids 0..255 are the bytes, 256 ends a document."""
    return Encoding(
        encode=lambda document, text: np.frombuffer(text, dtype=np.uint8),
        eod=BYTE_EOD,
        vocab_size=BYTE_VOCAB_SIZE,
        flags=f"--tokenizer-type NullTokenizer --vocab-size {BYTE_VOCAB_SIZE}",
    )


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
    left = max_bytes
    # A bar shows up only when reading takes more than a few seconds.
    for document in tqdm(documents, desc="documents", unit="doc", delay=3):
        text = document.read()
        if left is not None and len(text) >= left:
            if text := cut_text(text, left):
                yield document, text
            return
        if left is not None:
            left -= len(text)
        if text:
            yield document, text


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
    partial = f"{output_prefix}.partial"
    eod = np.array([encoding.eod] if append_eod else [], dtype=np.int64)
    count = text_bytes = tokens = 0
    try:
        builder = IndexedDatasetBuilder(
            get_bin_path(partial), dtype=DType.optimal_dtype(encoding.vocab_size)
        )
        for document, text in read_texts(documents, max_bytes):
            ids = np.concatenate([encoding.encode(document, text), eod])
            if ids.size == 0:
                continue
            builder.add_document(ids, [ids.size])
            count, text_bytes, tokens = count + 1, text_bytes + len(text), tokens + ids.size
        builder.finalize(get_idx_path(partial))
        if count == 0:
            raise ValueError("the inputs hold no text; give files that are not empty")
        os.replace(get_bin_path(partial), get_bin_path(str(output_prefix)))
        os.replace(get_idx_path(partial), get_idx_path(str(output_prefix)))
    finally:
        Path(get_bin_path(partial)).unlink(missing_ok=True)
        Path(get_idx_path(partial)).unlink(missing_ok=True)
    return CorpusSummary(documents=count, text_bytes=text_bytes, tokens=tokens)


def build_parser() -> argparse.ArgumentParser:
    """Command-line interface of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("inputs", nargs="*", type=Path, help="text files and folders of them")
    parser.add_argument(
        "--builtin",
        action="append",
        default=[],
        choices=sorted(BUILTINS),
        help="text that comes with Python, after the inputs; may be repeated",
    )
    parser.add_argument(
        "--output-prefix", type=Path, required=True, help="writes PREFIX.bin and PREFIX.idx"
    )
    parser.add_argument("--max-bytes", type=int, help="stop after this many bytes of text")
    parser.add_argument(
        "--document-glob",
        action="append",
        metavar="PATTERN",
        help=f"files to take from folders; may be repeated (default: {' '.join(DEFAULT_GLOBS)})",
    )
    parser.add_argument(
        "--append-eod", action="store_true", help="end every document with the id for that"
    )
    parser.add_argument(
        "--tokenizer", metavar="NAME_OR_PATH", help="Hugging Face tokenizer (default: bytes)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare one corpus and say how to train on it."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.max_bytes is not None and args.max_bytes < 1:
            raise ValueError(f"--max-bytes {args.max_bytes}: give a number of bytes, 1 or more")
        if not args.inputs and not args.builtin:
            raise ValueError("nothing to read: give files or folders, or --builtin")
        documents = find_documents(args.inputs, args.document_glob or DEFAULT_GLOBS)
        for name in args.builtin:
            documents += BUILTINS[name]()
        if args.tokenizer is None:
            encoding = make_byte_encoding()
        else:
            encoding = make_hugging_face_encoding(args.tokenizer)
        summary = write_corpus(
            documents,
            encoding,
            args.output_prefix,
            append_eod=args.append_eod,
            max_bytes=args.max_bytes,
        )
    except ValueError as error:
        parser.error(str(error))
    print(
        f"{args.output_prefix}: {summary.documents} documents, {summary.text_bytes} bytes, "
        f"{summary.tokens} tokens"
    )
    print(f"train with: --data-path {args.output_prefix} {encoding.flags}")


if __name__ == "__main__":
    main()
