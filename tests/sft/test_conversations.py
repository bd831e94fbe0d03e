"""JSONL files: every form that people bring, and errors that say where and what to do."""

import json

import pytest

from megatron_llep.training.sft.conversations import read_conversations

TURNS = [("user", "3+4="), ("assistant", "7")]


def write(tmp_path, *entries):
    path = tmp_path / "chat.jsonl"
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_text("\n".join(lines) + "\n")
    return path


MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


@pytest.mark.parametrize(
    "entry",
    [
        {"messages": MESSAGES, "id": 7},
        {"conversations": [{"from": "human", "value": "3+4="}, {"from": "gpt", "value": "7"}]},
        {"prompt": "3+4=", "completion": "7"},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        {"query": "3+4=", "response": "7"},
        {"instruction": "3+4=", "input": "", "output": "7"},
    ],
    ids=["messages", "sharegpt", "pair", "pair of messages", "query", "alpaca"],
)
def test_every_form_reads_as_the_same_turns(entry, tmp_path):
    (conversation,) = read_conversations(write(tmp_path, entry))
    assert [(each["role"], each["content"]) for each in conversation.messages] == TURNS


def test_alpaca_joins_instruction_and_input(tmp_path):
    entry = {"instruction": "Add.", "input": "3 and 4", "output": "7"}
    (conversation,) = read_conversations(write(tmp_path, entry))
    assert conversation.messages[0]["content"] == "Add.\n\n3 and 4"


def test_what_only_templates_know_is_kept(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    entry = {"messages": [*MESSAGES[:1], call], "tools": [{"name": "add"}]}
    (conversation,) = read_conversations(write(tmp_path, entry))
    assert conversation.messages[1] == call
    assert conversation.tools == [{"name": "add"}]


def test_lines_are_counted_with_the_empty_ones(tmp_path):
    path = write(
        tmp_path, {"prompt": "a", "completion": "b"}, "", {"prompt": "c", "completion": ""}
    )
    assert [each.place for each in read_conversations(path)] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("entry", "what", "remedy"),
    [
        ("{'a': 1}", "not JSON", "one JSON object a line"),
        ("[1]", "a JSON list", "messages"),
        ({"text": "hello"}, "no known key among ['text']", "prompt and completion"),
        ({"messages": "hello"}, "messages is no list", "role, content"),
        ({"messages": [{"content": "hello"}]}, "a message without a role", "role, content"),
        ({"messages": []}, "no messages", "drop the line"),
        ({"conversations": [{"from": "human"}]}, "conversations lacks 'value'", "from and value"),
        ({"prompt": 3, "completion": "7"}, "prompt is int", "give text"),
    ],
)
def test_bad_lines_name_file_line_and_remedy(entry, what, remedy, tmp_path):
    path = write(tmp_path, {"messages": MESSAGES}, entry)
    with pytest.raises(ValueError, match=r"chat\.jsonl:2: ") as error:
        list(read_conversations(path))
    assert what in str(error.value)
    assert remedy in str(error.value)


def test_a_byte_order_mark_is_no_error_and_other_bytes_are(tmp_path):
    path = write(tmp_path, {"messages": MESSAGES})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b'{"prompt": "\xff"}\n')
    conversations = read_conversations(path)
    assert next(conversations).messages == MESSAGES
    with pytest.raises(ValueError, match=r"chat\.jsonl:2: not JSON"):
        next(conversations)


def test_missing_and_empty_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--data-path .*nowhere.jsonl: no such file"):
        list(read_conversations(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match=r"--data-path .*chat.jsonl: the file is empty"):
        list(read_conversations(write(tmp_path, "", "  ")))
