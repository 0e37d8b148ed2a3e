"""Exponential moving average of the weights: the network that is sampled.

    ema <- ema + (1 - beta_n) (weights - ema),    beta_n = min(decay, (1 + n) / (10 + n))

The warm-up of beta lets a short run forget its random start: after n updates the average reaches
back over about a tenth of them, until the fixed decay takes over. The average is kept in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Ema"]


class Ema:
    """Averages the parameters of a module; buffers are taken as they are.

    Args:
        module: The module whose weights are followed.
        decay: beta after the warm-up, in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._source = dict(module.named_parameters())
        self.weights = {name: p.detach().float().clone() for name, p in self._source.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights after optimizer step `step`, counted from 1."""
        beta = min(self.decay, (1 + step) / (10 + step))
        averages = list(self.weights.values())
        torch._foreach_lerp_(averages, [p.float() for p in self._source.values()], 1 - beta)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averages by parameter name."""
        return dict(self.weights)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over saved averages; names and shapes must agree (KeyError, RuntimeError)."""
        for name, average in self.weights.items():
            average.copy_(state[name])
