"""What crosses between nodes, in one unit: the crossing of a (token, expert) pair.

Letters: H hidden size, F inner size of an expert.
"""

from dataclasses import dataclass

from megatron_llep.lending.fan_out import SCATTER_FROM


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What a loan takes of a link, in pairs that would take as long.

    A pair that leaves its node crosses four times: dispatch and combine, forward and backward,
    twice in each direction of its own node's link and of the other's. Weights cross one way, and
    their gradients the other. So a direction carries two tokens for a pair, and

        weights = bytes of an expert's weights, as often as they are sent / (2 x bytes of a token)
        gradients = bytes of its gradients / (2 x bytes of a token)

    The rate of the link cancels.

    Raises:
        ValueError: a price is negative.
    """

    weights: int = 3 * 2048 // 2
    """Of one crossing of an expert's weights; default: bf16, SwiGLU of F = 2048, whatever H is."""
    gradients: int = 3 * 2048
    """Of one crossing of its gradients; default: fp32."""
    scatter_from: int = SCATTER_FROM
    """Nodes from which on an expert crosses in shards; 0: never."""

    def __post_init__(self) -> None:
        for name in ("weights", "gradients", "scatter_from"):
            if getattr(self, name) < 0:
                raise ValueError(f"prices: {name}={getattr(self, name)} must be at least 0")


USUAL_PRICES = Prices()
