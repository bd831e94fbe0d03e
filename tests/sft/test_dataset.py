"""What a pack holds, and how files become training, validation and test sets."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from megatron_llep.training.chat import ByteChat
from megatron_llep.training.sft.dataset import SFTDataset, SFTDatasetConfig
from megatron_llep.training.sft.tokens import load_tokens

S = 32
USER, ASSISTANT, END, PAD = 259, 260, 256, 257


def write(path, pairs):
    with path.open("w") as file:
        for prompt, completion in pairs:
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    return str(path)


def make_config(*paths, split="1,0,0", weights=None, **settings):
    blend = (list(paths), weights)
    common = {"random_seed": 5, "sequence_length": S, "chat": ByteChat()}
    return SFTDatasetConfig(blend=blend, split=split, **(common | settings))


def build(config, sizes=(4, 0, 0)):
    return BlendedMegatronDatasetBuilder(SFTDataset, list(sizes), lambda: True, config).build()


@pytest.fixture
def sums(tmp_path):
    return write(tmp_path / "sums.jsonl", [(f"{a}+1=", str(a + 1)) for a in range(40)])


def read_segments(item):
    """Inputs, labels and what is trained of each segment of a pack."""
    starts = item["cu_seqlens"].unique().tolist()
    for start, end in itertools.pairwise(starts):
        part = slice(start, end)
        yield tuple(item[key][part].tolist() for key in ("tokens", "labels", "loss_mask"))


def test_labels_follow_inputs_within_each_conversation(sums):
    train, _, _ = build(make_config(sums))
    seen = []
    for index in range(4):
        item = train[index]
        assert {key: value.dtype for key, value in item.items()} == {
            **dict.fromkeys(("tokens", "labels", "position_ids"), torch.int64),
            "loss_mask": torch.float32,
            **dict.fromkeys(("cu_seqlens", "max_seqlen"), torch.int32),
        }
        assert item["cu_seqlens"].shape == (S + 1,)
        segments = list(read_segments(item))
        assert item["max_seqlen"] == max(len(inputs) for inputs, _, _ in segments)
        for inputs, labels, trained in segments:
            if inputs[0] == PAD:
                assert set(inputs) == set(labels) == {PAD}
                assert set(trained) == {0}
                continue
            assert inputs[0] == USER
            assert inputs[1:] == labels[:-1]
            answer = labels[inputs.index(ASSISTANT) :]
            assert answer[-1] == END
            assert trained == [0] * (len(labels) - len(answer)) + [1] * len(answer)
            seen.append(bytes(answer[:-1]))
        ends = np.cumsum([len(inputs) for inputs, _, _ in segments])
        expected = [range(end - start) for start, end in itertools.pairwise([0, *ends])]
        assert item["position_ids"].tolist() == [i for each in expected for i in each]
    assert len(seen) > 8, "several conversations share a pack"
    assert len(seen) == len(set(seen)), "none twice in an epoch"


def test_without_packing_a_sequence_has_one_conversation(sums):
    train, _, _ = build(make_config(sums, packing=False))
    for index in range(4):
        inputs = [segment[0] for segment in read_segments(train[index])]
        assert [segment[0] for segment in inputs] == [USER, PAD]


def test_epochs_follow_each_other_in_another_order(sums):
    config = make_config(sums)
    one_epoch = len(build(config, (1, 0, 0))[0])
    train, _, _ = build(config, (2 * one_epoch, 0, 0))

    def take(first):
        return [train[first + index]["tokens"].tolist() for index in range(one_epoch)]

    def sort(packs):
        return sorted(segment for pack in packs for segment in bytes_of(pack))

    def bytes_of(pack):
        return bytes(id if id < 256 else 0 for id in pack).split(b"\0")

    first, second = take(0), take(one_epoch)
    assert first != second
    assert sort(first) == sort(second)


def test_splits_share_no_conversation(sums):
    sets = build(make_config(sums, split="80,10,10"), (8, 2, 2))
    answers = []
    for dataset in sets:
        items = [dataset[index] for index in range(len(dataset))]
        labels = [item["labels"][item["loss_mask"] > 0].tolist() for item in items]
        answers.append({tuple(part) for each in labels for part in split_at_end(each)})
    assert [len(each) for each in answers] == [32, 4, 4]
    assert len(set.union(*answers)) == 40


def split_at_end(ids):
    part = []
    for id in ids:
        part.append(id)
        if id == END:
            yield part
            part = []


def test_blends_weigh_files(sums, tmp_path):
    other = write(tmp_path / "other.jsonl", [("x" * 9, "y" * 9)] * 40)
    train, _, _ = build(make_config(sums, other, weights=[0.25, 0.75]), (40, 0, 0))
    from_other = sum(ord("x") in train[index]["tokens"] for index in range(40))
    assert from_other == 30


def test_an_empty_part_of_the_split_is_refused(sums):
    with pytest.raises(ValueError, match=r"--split 999,1,0: leaves no conversation of .* valid"):
        build(make_config(sums, split="999,1,0"), (4, 1, 0))


def test_long_conversations_are_refused_or_cut(tmp_path):
    path = write(tmp_path / "long.jsonl", [("a", "b"), ("a", "b" * 99), ("a" * 99, "b")])
    config = make_config(path)
    with pytest.raises(ValueError, match=r"long.jsonl: 2 of 3 .* --seq-length 32") as error:
        build(config)
    assert "in line 2" in str(error.value)
    assert "--sft-truncate" in str(error.value)
    tokens, notice = load_tokens(path, ByteChat(), cache=None, key=()).limit(S, truncate=True)
    assert tokens.lengths.tolist() == [5, S], "the third keeps no answer"
    assert "1 dropped" in notice
    train, _, _ = build(replace(config, truncate=True))
    assert len(train) == 4
    only_long = write(tmp_path / "only.jsonl", [("a" * 99, "b")])
    with pytest.raises(ValueError, match="no answer is left"):
        build(make_config(only_long, truncate=True))


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, "no answer"),
        ({"messages": [{"role": "critic", "content": "hi"}]}, "unknown role 'critic'"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "is list, not text"),
    ],
)
def test_what_cannot_be_written_names_file_and_line(entry, what, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n" + json.dumps(entry))
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: ") as error:
        build(make_config(str(path)))
    assert what in str(error.value)


def test_the_cache_gives_the_same_tokens_and_notices_a_new_file(tmp_path, sums):
    cache = str(tmp_path / "cache")
    made = load_tokens(sums, ByteChat(), cache=cache, key="bytes")
    (stored,) = (tmp_path / "cache").iterdir()
    again = load_tokens(sums, None, cache=cache, key="bytes")  # without a chat: nothing is encoded
    for name, value in vars(made).items():
        assert np.array_equal(getattr(again, name), value), name
    write(tmp_path / "sums.jsonl", [("a", "b")])
    assert len(load_tokens(sums, ByteChat(), cache=cache, key="bytes").lines) == 1
    assert stored.exists()
