"""Which tokens of a conversation are trained: bytes, and chat templates of the kinds that exist."""

from argparse import Namespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llep.training.chat import ByteChat, TemplateChat, build_chat, check_chat_arguments

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]
TEXT = st.text(max_size=8)


def read_trained(chat, example, decode):
    """The runs of trained tokens, as text."""
    runs, current = [], []
    for id, is_trained in zip([*example.ids, None], [*example.trained, False], strict=True):
        if is_trained:
            current.append(id)
        elif current:
            runs.append(decode(current))
            current = []
    return runs


# Bytes


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_bytes_train_on_answers_and_their_end(turns):
    chat = ByteChat()
    messages = [
        {"role": role, "content": text}
        for question, answer in turns
        for role, text in (("user", question), ("assistant", answer))
    ]
    (example,) = chat.encode(messages)
    assert len(example.ids) == len(example.trained)
    ends = [i for i, id in enumerate(example.ids) if id in chat.end_ids]
    assert len(ends) == len(messages)
    assert read_trained(chat, example, chat.decode) == [answer for _, answer in turns]
    prompt = chat.prompt(messages[:-1])
    assert example.ids[: len(prompt)] == prompt
    assert not any(example.trained[: len(chat.prompt(messages[:1]))])


def test_broken_utf8_is_shown():
    assert ByteChat().decode([*"é".encode()[:1], 97, 256]) == "�a"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tokenizer_type": "SFTTokenizer"}, "--tokenizer-type SFTTokenizer: "),
        ({"vocab_size": 257}, "--vocab-size 257: .* give --vocab-size 262"),
        ({"tokenizer_type": "HuggingFaceTokenizer"}, "--tokenizer-model is missing"),
    ],
)
def test_unfit_tokenizers_are_refused(settings, named):
    args = Namespace(
        **{
            "tokenizer_type": "NullTokenizer",
            "tokenizer_model": None,
            "vocab_size": 262,
            "padded_vocab_size": None,
            **settings,
        }
    )
    with pytest.raises(ValueError, match=named):
        check_chat_arguments(args)


# Templates

CHATML = """{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# Reasoning is written in the last turn only, as in Qwen3's template.
REASONING = """{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# The last answer ends otherwise than those before it, as in the template of gpt-oss.
RETURN = """{%- for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}
{%- if m.role == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}
{%- endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"""
# The prompt ends within what the whole text has as one token: the space belongs to the word.
SHARED_TOKEN = """{%- for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""
NO_PREFIX = """{%- for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}
{%- if add_generation_prompt %}Answer: {% endif %}"""
STRICT = """{%- for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}
{%- endif %}{{ m.content }}<|end|>{% endfor %}"""


@pytest.fixture(scope="module")
def make_chat():
    pytest.importorskip("transformers", reason="pip install megatron-llep[hf]")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|message|>", "<|end|>", "<|return|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["user: assistant: system: one two three four"], trainer)

    def make(template, **tokens):
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, **{"eos_token": "<|endoftext|>", **tokens}
        )
        fast.add_special_tokens({"additional_special_tokens": special})
        fast.chat_template = template
        return TemplateChat(fast, name="tiny")

    return make


def test_a_template_that_only_grows_gives_one_example(make_chat):
    chat = make_chat(CHATML)
    (example,) = chat.encode(TURNS)
    trained = read_trained(chat, example, chat._tokenizer.decode)
    assert trained == ["two<|im_end|>\n", "four<|im_end|>\n"]
    assert chat.decode(example.ids).startswith("system\nBe brief.\nuser\none\n")
    assert chat.prompt(TURNS[:2]) == example.ids[: len(chat.prompt(TURNS[:2]))]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (
            REASONING,
            ["<think>\n\n</think>\n\ntwo<|im_end|>\n", "<think>\n\n</think>\n\nfour<|im_end|>\n"],
        ),
        (RETURN, ["<|message|>two<|return|>", "<|message|>four<|return|>"]),
    ],
    ids=["reasoning", "return"],
)
def test_a_template_that_rewrites_turns_gives_an_example_for_each(make_chat, template, answers):
    chat = make_chat(template)
    examples = chat.encode(TURNS)
    decode = chat._tokenizer.decode
    assert [read_trained(chat, each, decode) for each in examples] == [[a] for a in answers]
    # Each answer stands behind exactly what the model is given when it is to generate it.
    for example, turns in zip(examples, (TURNS[:2], TURNS[:4]), strict=True):
        first = example.trained.index(True)
        assert example.ids[:first] == chat.prompt(turns)


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (REASONING, "<|im_end|>"), (RETURN, "<|return|>")]
)
def test_the_end_of_an_answer_is_found(make_chat, template, end):
    chat = make_chat(template)
    ends = {"<|endoftext|>", end}
    assert chat.end_ids == {chat._tokenizer.convert_tokens_to_ids(token) for token in ends}


def test_an_answer_is_cut_where_generation_cuts_it(make_chat):
    chat = make_chat(SHARED_TOKEN)
    decode = chat._tokenizer.decode
    examples = chat.encode(TURNS)
    trained = [answer for each in examples for answer in read_trained(chat, each, decode)]
    assert trained == ["two<|end|>", "four<|end|>"]
    assert examples[-1].ids[: len(chat.prompt(TURNS[:4]))] == chat.prompt(TURNS[:4])


def test_unusable_templates_are_refused(make_chat):
    with pytest.raises(
        ValueError, match="--tokenizer-model tiny: it has no chat template"
    ) as error:
        make_chat(None)
    assert "--chat-template" in str(error.value)
    with pytest.raises(ValueError, match=r"turn 3 .assistant. other than it prompts for it"):
        make_chat(NO_PREFIX).encode(TURNS)
    with pytest.raises(ValueError, match=r"cannot write this conversation .*: no system"):
        make_chat(STRICT).encode(TURNS)


def test_ids_of_a_padded_vocabulary_are_not_decoded(make_chat):
    chat = make_chat(CHATML)
    assert chat.decode([*chat._tokenizer.encode("two"), 10**6]) == "two"


def test_the_chat_of_a_run_is_megatrons_tokenizer(make_chat, tmp_path):
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import parse_args

    make_chat(CHATML)._tokenizer.save_pretrained(tmp_path)
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sft_gpt.py", *flags])
        args = parse_args()
    args.rank = 0
    chat = build_chat(args, build_tokenizer(args))
    assert len(chat.encode(TURNS)) == 1
