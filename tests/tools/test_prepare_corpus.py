"""tools/prepare_corpus.py: what is written reads back through Megatron's IndexedDataset."""

import argparse
import sys
import sysconfig
import types
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import add_megatron_arguments

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import prepare_corpus

from megatron_llep.offline import corpus
from megatron_llep.offline.corpus import BYTE_EOD as EOD


@pytest.fixture
def prepare(tmp_path, capsys):
    """Run the tool; gives the documents as lists of ids."""

    def run(*argv):
        prefix = tmp_path / "out" / "corpus"
        prepare_corpus.main([*map(str, argv), "--output-prefix", str(prefix)])
        assert sorted(file.name for file in prefix.parent.iterdir()) == [
            "corpus.bin",
            "corpus.idx",
        ]
        return read_back(prefix)

    return run


def read_back(prefix):
    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def write_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_every_byte_comes_back(tmp_path, prepare):
    every_byte = bytes(range(256))
    path = tmp_path / "bytes"
    path.write_bytes(every_byte)
    assert prepare(path) == [list(every_byte)]
    assert prepare(path, "--append-eod") == [[*every_byte, EOD]]


def test_ids_take_two_bytes_each(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abc")
    prefix = tmp_path / "corpus"
    prepare_corpus.main([str(path), "--append-eod", "--output-prefix", str(prefix)])
    assert np.fromfile(f"{prefix}.bin", dtype=np.uint16).tolist() == [97, 98, 99, EOD]


def test_folders_are_read_in_sorted_order_and_inputs_in_theirs(tmp_path, prepare):
    folder = write_files(
        tmp_path / "in", {"b.txt": "b", "a/z.txt": "z", "a.md": "m", "c.py": "no", "B.txt": "B"}
    )
    last = write_files(tmp_path / "more", {"named.py": "p"}) / "named.py"
    texts = [bytes(ids).decode() for ids in prepare(last, folder)]
    assert texts == ["p", "B", "m", "z", "b"]


def test_document_globs_choose_files_once(tmp_path, prepare):
    folder = write_files(tmp_path / "in", {"a.txt": "a", "b.py": "b", "sub/c.py": "c"})
    documents = prepare(folder, "--document-glob", "*.py", "--document-glob", "b.*")
    assert [bytes(ids) for ids in documents] == [b"b", b"c"]


def test_the_same_input_gives_the_same_files(tmp_path):
    folder = write_files(tmp_path / "in", {f"{i}.txt": f"text {i}" for i in range(20)})
    files = []
    for name in ("one", "two"):
        prepare_corpus.main([str(folder), "--output-prefix", str(tmp_path / name)])
        files.append([(tmp_path / f"{name}{end}").read_bytes() for end in (".bin", ".idx")])
    assert files[0] == files[1]


def test_empty_files_are_no_documents(tmp_path, prepare):
    folder = write_files(tmp_path / "in", {"a.txt": "", "b.txt": "b"})
    assert prepare(folder, "--append-eod") == [[ord("b"), EOD]]


@pytest.mark.parametrize(
    ("max_bytes", "texts"),
    [
        (1, ["a"]),
        (3, ["aaa"]),
        (4, ["aaa"]),  # é takes two bytes
        (5, ["aaa", "é"]),
        (6, ["aaa", "éb"]),
        (7, ["aaa", "éb", "c"]),
        (99, ["aaa", "éb", "c"]),
    ],
)
def test_max_bytes_cuts_between_characters(tmp_path, prepare, max_bytes, texts):
    folder = write_files(tmp_path / "in", {"1.txt": "aaa", "2.txt": "éb", "3.txt": "c"})
    documents = prepare(folder, "--max-bytes", max_bytes)
    assert [bytes(ids).decode() for ids in documents] == texts


def test_max_bytes_reads_no_further_than_needed(tmp_path):
    def fail():
        raise AssertionError("read past --max-bytes")

    documents = [
        corpus.Document("first", lambda: b"12345"),
        corpus.Document("second", fail),
    ]
    summary = corpus.write_corpus(documents, corpus.BYTES, tmp_path / "corpus", max_bytes=5)
    assert summary == corpus.CorpusSummary(documents=1, text_bytes=5, tokens=5)


def test_builtin_python_docs_is_the_language_reference(prepare):
    from pydoc_data.topics import topics

    documents = prepare("--builtin", "python-docs")
    assert [bytes(ids).decode() for ids in documents] == [topics[name] for name in sorted(topics)]


def test_builtin_python_stdlib_is_source_without_tests(prepare):
    names = [document.name for document in corpus.load_python_stdlib()]
    root = Path(sysconfig.get_path("stdlib"))
    relative = [Path(name).relative_to(root) for name in names]
    assert relative == sorted(relative, key=lambda path: path.as_posix())
    assert {Path("os.py"), Path("json/decoder.py")} <= set(relative)
    parts = {part for path in relative for part in path.parts}
    assert not parts & {"test", "tests", "site-packages", "pydoc_data"}
    first = Path(names[0]).read_bytes()
    documents = prepare("--builtin", "python-stdlib", "--max-bytes", len(first) + 10)
    assert bytes(documents[0]) == first
    assert len(documents[1]) == 10


def test_builtins_follow_the_inputs(tmp_path, prepare):
    path = write_files(tmp_path / "in", {"a.txt": "mine"}) / "a.txt"
    documents = prepare(path, "--builtin", "python-docs", "--max-bytes", 10)
    assert bytes(documents[0]) == b"mine"
    assert len(documents) == 2


def test_printed_flags_give_megatron_the_same_vocabulary(tmp_path, capsys):
    path = write_files(tmp_path / "in", {"a.txt": "a"}) / "a.txt"
    prepare_corpus.main([str(path), "--append-eod", "--output-prefix", str(tmp_path / "corpus")])
    flags = capsys.readouterr().out.split("train with: ")[1].split()
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = parser.parse_args([*flags, "--make-vocab-size-divisible-by", "1"])
    args.rank, args.tensor_model_parallel_size = 0, 1
    tokenizer = build_tokenizer(args)
    assert args.data_path == [str(tmp_path / "corpus")]
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, EOD)
    assert args.padded_vocab_size == 257


class WordTokenizer:
    """Stands for a Hugging Face tokenizer: every word gets the id 1000 + its length."""

    eos_token_id = 7

    def __len__(self):
        return 100_000

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [1000 + len(word) for word in text.split()]


@pytest.fixture
def word_tokenizer(monkeypatch):
    def from_pretrained(name):
        if name != "words":
            raise OSError("not found")
        return WordTokenizer()

    module = types.ModuleType("transformers")
    module.AutoTokenizer = types.SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setitem(sys.modules, "transformers", module)


@pytest.mark.usefixtures("word_tokenizer")
def test_a_hugging_face_tokenizer_makes_the_ids(tmp_path, prepare, capsys):
    folder = write_files(tmp_path / "in", {"a.txt": "one three", "b.txt": " "})
    assert prepare(folder, "--tokenizer", "words", "--append-eod") == [[1003, 1005, 7], [7]]
    assert "HuggingFaceTokenizer --tokenizer-model words" in capsys.readouterr().out


def expect_error(capsys, argv, words):
    with pytest.raises(SystemExit) as exit_info:
        prepare_corpus.main([str(arg) for arg in argv])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["nothing to read", "--builtin"]),
        (["missing.txt"], ["missing.txt", "no such file or folder"]),
        (["IN"], ["no file matches", "--document-glob", "*.txt"]),
        (["IN/a.py", "--max-bytes", "0"], ["--max-bytes 0", "1 or more"]),
        (["IN/empty"], ["no text"]),
        (["--builtin", "wikipedia"], ["--builtin", "python-docs"]),
        (["IN/a.py", "--tokenizer", "nope"], ["--tokenizer nope", "cannot be loaded"]),
        (["IN/binary", "--tokenizer", "words"], ["binary", "not UTF-8", "--document-glob"]),
    ],
)
@pytest.mark.usefixtures("word_tokenizer")
def test_bad_input_is_an_error_that_names_the_way_out(tmp_path, capsys, argv, words):
    folder = write_files(tmp_path / "in", {"a.py": "a", "empty": "", "binary": b"\xff\xfe"})
    argv = [arg.replace("IN", str(folder)) for arg in argv]
    prefix = tmp_path / "out" / "corpus"
    expect_error(capsys, [*argv, "--output-prefix", prefix], words)
    assert not list(tmp_path.glob("out/*"))


def test_transformers_missing_is_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    argv = ["--builtin", "python-docs", "--tokenizer", "x", "--output-prefix", tmp_path / "c"]
    expect_error(capsys, argv, ["--tokenizer x", "transformers", "pip install"])


def test_missing_topics_is_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    argv = ["--builtin", "python-docs", "--output-prefix", tmp_path / "c"]
    expect_error(capsys, argv, ["--builtin python-docs", "pydoc_data.topics", "python-stdlib"])


@pytest.mark.usefixtures("word_tokenizer")
def test_append_eod_needs_an_id_for_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(WordTokenizer, "eos_token_id", None)
    argv = ["--builtin", "python-docs", "--tokenizer", "words", "--append-eod"]
    expect_error(capsys, [*argv, "--output-prefix", tmp_path / "c"], ["--append-eod"])


@pytest.mark.usefixtures("word_tokenizer")
def test_a_failed_run_keeps_the_files_that_were_there(tmp_path, capsys):
    folder = write_files(tmp_path / "in", {"a.txt": "a", "b.txt": b"\xff"})
    prefix = tmp_path / "corpus"
    prepare_corpus.main([str(folder / "a.txt"), "--output-prefix", str(prefix)])
    expect_error(capsys, [folder, "--tokenizer", "words", "--output-prefix", prefix], ["b.txt"])
    assert read_back(prefix) == [[ord("a")]]
