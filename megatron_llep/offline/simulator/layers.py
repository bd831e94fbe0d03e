"""Which layers a model has, and how many weights those have that are neither experts nor dense."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

# Symbols of Megatron's --hybrid-layer-pattern, one a layer; + and D are attention as * is.
_SYMBOLS = {
    "*": "attention",
    "+": "attention",
    "D": "attention",
    "-": "dense",
    "E": "moe",
    "M": "mamba",
    "G": "gdn",
}


def count_layers(args: Mapping[str, Any]) -> Counter[str]:
    """Layers by kind: attention, dense, moe, mamba, gdn; those of multi-token prediction left out.

    Args:
        args: Megatron's flags, without dashes in front. A layer of a GPT model is one of attention,
            and one that is dense or of experts.

    Raises:
        ValueError: a pattern or frequency that Megatron does not know; names the flag.
    """
    pattern = args.get("hybrid-layer-pattern")
    if pattern:
        symbols = str(pattern).split("/")[0].replace("|", "")
        unknown = sorted(set(symbols) - _SYMBOLS.keys())
        if unknown:
            raise ValueError(
                f"--hybrid-layer-pattern {pattern}: {unknown[0]} is no layer; write one of "
                f"{' '.join(_SYMBOLS)} for each"
            )
        return Counter(_SYMBOLS[symbol] for symbol in symbols)
    layers = args["num-layers"]
    moe_layers = _count_moe_layers(args.get("moe-layer-freq", 1), layers)
    return Counter(attention=layers, moe=moe_layers, dense=layers - moe_layers)


def count_attention_weights(args: Mapping[str, Any]) -> int:
    """Numbers in one layer's attention matrices."""
    hidden, heads = args["hidden-size"], args["num-attention-heads"]
    if args.get("multi-latent-attention"):
        rope, qk, v = args["qk-pos-emb-head-dim"], args["qk-head-dim"], args["v-head-dim"]
        q_rank, kv_rank = args.get("q-lora-rank"), args["kv-lora-rank"]
        of_query = heads * (qk + rope)
        query = hidden * q_rank + q_rank * of_query if q_rank else hidden * of_query
        key_value = hidden * (kv_rank + rope) + kv_rank * heads * (qk + v)
        return query + key_value + heads * v * hidden
    groups = args.get("num-query-groups", heads)
    return hidden * args["kv-channels"] * (2 * heads + 2 * groups)


def count_mamba_weights(args: Mapping[str, Any]) -> int:
    """Numbers in the two matrices of a Mamba layer, beside which its scan is little work."""
    hidden, head = args["hidden-size"], args.get("mamba-head-dim", 64)
    heads = args.get("mamba-num-heads") or 2 * hidden // head
    states = args.get("mamba-num-groups", 8) * args.get("mamba-state-dim", 128)
    inner = heads * head
    return hidden * (2 * inner + 2 * states + heads) + inner * hidden


def count_gdn_weights(args: Mapping[str, Any]) -> int:
    """Numbers in the two matrices of a gated delta net."""
    value_heads = args.get("linear-num-value-heads", 32)
    key = args.get("linear-num-key-heads", 16) * args.get("linear-key-head-dim", 128)
    value = value_heads * args.get("linear-value-head-dim", 128)
    return args["hidden-size"] * (2 * key + 2 * value + 2 * value_heads + value)


def _count_moe_layers(frequency: int | str | list[int], layers: int) -> int:
    """Megatron's --moe-layer-freq: every n-th layer, or a pattern such as ([0]*3+[1]*58).

    A list is what Megatron reads from the latter.
    """
    if isinstance(frequency, int):
        return len(range(0, layers, frequency))
    if isinstance(frequency, list):
        return sum(frequency)
    runs = re.findall(r"\[([01])\]\*(\d+)", frequency)
    if sum(int(n) for _, n in runs) != layers:
        raise ValueError(f"--moe-layer-freq={frequency}: write ([0]*3+[1]*58) for {layers} layers")
    return sum(int(n) for kind, n in runs if kind == "1")
