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
from collections.abc import Sequence
from pathlib import Path

from megatron_llep.offline.corpus import (
    BUILTINS,
    BYTES,
    find_documents,
    make_hugging_face_encoding,
    write_corpus,
)

DEFAULT_GLOBS = ("*.txt", "*.md", "*.rst")


def build_parser() -> argparse.ArgumentParser:
    """Command-line interface of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, help="text files and folders of them")
    add(
        "--builtin",
        action="append",
        default=[],
        choices=sorted(BUILTINS),
        help="text that comes with Python, after the inputs; may be repeated",
    )
    add("--output-prefix", type=Path, required=True, help="writes PREFIX.bin and PREFIX.idx")
    add("--max-bytes", type=int, help="stop after this many bytes of text")
    add(
        "--document-glob",
        action="append",
        metavar="PATTERN",
        help=f"files to take from folders; may be repeated (default: {' '.join(DEFAULT_GLOBS)})",
    )
    add("--append-eod", action="store_true", help="end every document with the id for that")
    add("--tokenizer", metavar="NAME_OR_PATH", help="Hugging Face tokenizer (default: bytes)")
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
        encoding = make_hugging_face_encoding(args.tokenizer) if args.tokenizer else BYTES
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
