"""finetune/sft_gpt.py, as a user starts it, from a Hugging Face folder to another."""

import json
import sys
from pathlib import Path

import torch
from hf_models import make_qwen3_moe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "scripts"))

from script_runs import run_command  # noqa: E402

from support.ports import find_free_port  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(folder):
    """Bytes and four special tokens, with a chat template."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in ("<|user|>", "<|assistant|>", "<|end|>", "<pad>"):
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)


def conversation(i):
    ask = {"role": "user", "content": f"say {i % 5}"}
    return [ask, {"role": "assistant", "content": f"{i % 5}{i % 5}"}]


@torch.no_grad()
def answer_loss(folder):
    """Mean loss of the answers' tokens, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = []
    for i in range(5):
        whole = tokenizer.apply_chat_template(
            conversation(i), return_tensors="pt", return_dict=False
        )
        prompt = tokenizer.apply_chat_template(
            conversation(i)[:1], add_generation_prompt=True, return_dict=False
        )
        labels = whole.clone()
        labels[:, : len(prompt)] = -100
        losses.append(model(whole, labels=labels).loss)
    return torch.stack(losses).mean().item()


def test_a_chat_model_learns_and_transformers_runs_it(tmp_path):
    folder, saved = tmp_path / "model", tmp_path / "saved"
    make_qwen3_moe(folder, vocab_size=264, hidden_size=64, eos_token_id=258)
    make_tokenizer(folder)
    lines = [json.dumps({"messages": conversation(i)}) for i in range(100)]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2]
    command += ["--master-port", find_free_port(), ROOT / "finetune" / "sft_gpt.py"]
    command += ["--hf-load", folder, "--hf-save", saved, "--data-path", tmp_path / "chat.jsonl"]
    command += ["--split", "100,0,0", "--expert-model-parallel-size", 2, "--moe-llep"]
    command += ["--moe-token-dispatcher-type", "alltoall", "--seq-length", 96]
    command += ["--micro-batch-size", 1, "--global-batch-size", 2, "--train-iters", 20]
    command += ["--lr", 1e-2, "--lr-decay-style", "constant", "--eval-iters", 0]
    command += ["--eval-interval", 100, "--log-interval", 1]
    log = run_command([str(word) for word in command], timeout=150)
    before, after = answer_loss(folder), answer_loss(saved)
    assert before > 4
    assert after < 0.3 * before
    # The first loss in Megatron is of the same weights and the same tokens.
    assert abs(log.losses[1] - before) < 0.3
