"""What training minimises: per-example losses of a denoiser.

    x_t = alpha_t x + sigma_t eps,    denoise = mean over pixels of (target - prediction)^2

The target is the quantity that the network was asked for (v, eps or x); with EDM preconditioning it
is x under the weight (sigma^2 + sigma_d^2) / (sigma sigma_d)^2, which makes the loss of the raw
network uniform over noise levels (arXiv 2206.00364, Table 1). GMem adds the angle between the
velocities over the channels (arXiv 2412.08781):

    cosine = mean over pixels of 1 - <v, v_hat> / (|v| |v_hat|)

Losses come one number per example; the caller weighs and averages them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from stratagem.denoiser import Denoiser
from stratagem.schedule import expand

__all__ = ["Losses", "Objective"]


class Losses(NamedTuple):
    """Per-example losses, each of shape (B,)."""

    denoise: Tensor
    cosine: Tensor | None


class Objective(nn.Module):
    """Compares a denoiser with the truth.

    Args:
        denoiser: Network and schedule.
        cosine: Whether the angle of the velocities is measured too.
    """

    def __init__(self, denoiser: Denoiser, *, cosine: bool = False) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.cosine = cosine

    def forward(self, x: Tensor, eps: Tensor, t: Tensor, **condition: Tensor | None) -> Losses:
        """Returns the losses of a batch.

        Args:
            x: Clean samples, (B, C, H, W).
            eps: Their noise, like x.
            t: Their times, (B,).
            condition: What the backbone takes besides: memory (B, D), label (B,).
        """
        schedule = self.denoiser.schedule
        prediction = self.denoiser(schedule.perturb(x, eps, t), t, **condition)
        v = schedule.velocity(x, eps, t)
        v_hat = schedule.velocity(prediction.x, prediction.eps, t)
        match self.denoiser.parameterization:
            case "v":
                error = v_hat - v
            case "eps":
                error = prediction.eps - eps
            case "x":
                error = prediction.x - x
            case "edm":
                error = (prediction.x - x) * self._edm_weight(t, x).sqrt()
        cosine = (1 - cosine_similarity(v_hat, v, dim=1)).flatten(1).mean(1)
        return Losses(error.square().flatten(1).mean(1), cosine if self.cosine else None)

    def _edm_weight(self, t: Tensor, like: Tensor) -> Tensor:
        """lambda(sigma) = (sigma^2 + sigma_d^2) / (sigma sigma_d)^2, EDM Table 1."""
        schedule, data = self.denoiser.schedule, self.denoiser.sigma_data
        sigma = expand(schedule.sigma(t) / schedule.alpha(t), like)
        return (sigma**2 + data**2) / (sigma * data) ** 2
