"""Denoisers: a network and a schedule make a prediction of the clean sample and of the noise.

    F         = backbone(c_in x_t, time, ...)
    (x, eps)  = M(t) (x_t, F)          one 2x2 linear map for each parameterization

Whatever the network is trained to say, the result is a pair with alpha x + sigma eps = x_t, so that
solvers, guidance and losses know one currency and no parameterization:

    v     F = alpha' x + sigma' eps    x = (sigma' x_t - sigma F) / D
                                       eps = (alpha F - alpha' x_t) / D
                                       D = alpha sigma' - sigma alpha'  (Linear: D = 1)
    eps   F = eps                      x = (x_t - sigma F) / alpha
    x     F = x                        eps = (x_t - alpha F) / sigma
    edm   Karras et al. 2022, Table 1, arXiv:2206.00364, on x_t / alpha and sigma / alpha

`v` and `edm` are well defined at every noise level. `eps` cannot know x where alpha = 0, nor can
`x` know eps where sigma = 0: there the map keeps the law above with the divisor held at 1e-5.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from stratagem.errors import InputError
from stratagem.schedule import NoiseSchedule, expand
from stratagem.stages import Stages

__all__ = ["Denoiser", "Parameterization", "Prediction", "Predictor"]

Parameterization = Literal["v", "eps", "x", "edm"]

_DIVISOR_FLOOR = 1e-5
_LOG_SNR_LIMIT = 20.0  # keeps the time input of `edm` finite where sigma or alpha is zero


class Prediction(NamedTuple):
    """What is believed of a noisy sample: x = E[x | x_t] and eps = E[eps | x_t], both like x_t."""

    x: Tensor
    eps: Tensor


class Predictor(Protocol):
    """Whatever a sampler can use: a denoiser, or guidance wrapped around one."""

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule of its x_t."""

    def __call__(self, x_t: Tensor, t: Tensor, **condition: Any) -> Prediction:
        """Returns the prediction for x_t (B, *) at t, shape () or (B,)."""


class _Map(NamedTuple):
    """M(t): x = x_in x_t + x_out F, eps = eps_in x_t + eps_out F; each of the shape of t."""

    x_in: Tensor
    x_out: Tensor
    eps_in: Tensor
    eps_out: Tensor


class Denoiser(nn.Module):
    """Makes a network that knows no schedule into a predictor.

    Args:
        backbone: Called as backbone(input, time, **condition), input (B, *), time (B,); returns
            a tensor like its input.
        schedule: The schedule of x_t.
        parameterization: What the network says: "v", "eps", "x" or "edm".
        stages: If given, the backbone also receives stage=, unless the caller passes it: one int
            where t is 0-dim, else int64 (B,).
        sigma_data: Standard deviation of the data; "edm" only.

    Raises:
        InputError: If the parameterization is unknown or sigma_data is not above 0.
    """

    def __init__(
        self,
        backbone: nn.Module,
        schedule: NoiseSchedule,
        parameterization: Parameterization,
        stages: Stages | None = None,
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__()
        if parameterization not in get_args(Parameterization):
            raise InputError(
                f"parameterization {parameterization!r} is unknown: "
                f"choose one of {', '.join(get_args(Parameterization))}"
            )
        if not sigma_data > 0:
            raise InputError(f"sigma_data={sigma_data}: give a number above 0")
        self.backbone = backbone
        self.schedule = schedule
        self.parameterization = parameterization
        self.stages = stages
        self.sigma_data = sigma_data

    def forward(self, x_t: Tensor, t: Tensor, **condition: Any) -> Prediction:
        """Predicts the clean sample and the noise.

        Args:
            x_t: Noisy samples, shape (B, *).
            t: Times, shape () or (B,).
            **condition: Handed to the backbone: memory, label, stage.

        Returns:
            Two tensors like x_t with alpha x + sigma eps = x_t.
        """
        if self.stages is not None and "stage" not in condition:
            index = self.stages.index(self.schedule.log_snr(t))
            condition["stage"] = index if t.ndim else int(index)
        c_in, time = self._network_input(t)
        time = x_t.new_zeros(len(x_t)).add_(time)  # of a time on the host a GPU needs no copy
        output = self.backbone(expand(c_in, x_t) * x_t, time, **condition).to(x_t.dtype)
        m = _Map(*(expand(entry, x_t) for entry in self._map(t)))
        return Prediction(m.x_in * x_t + m.x_out * output, m.eps_in * x_t + m.eps_out * output)

    def _network_input(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the scale of the network's input and the time it is told, of the shape of t."""
        if self.parameterization != "edm":
            return torch.ones_like(t), t
        # c_in (x_t / alpha) with c_in = 1 / sqrt(sigma_edm^2 + sigma_data^2)
        scale = 1 / self._norm(t)
        # c_noise = ln(sigma_edm) / 4 = -log_snr / 8
        log_snr = self.schedule.log_snr(t).clamp(-_LOG_SNR_LIMIT, _LOG_SNR_LIMIT)
        return scale, log_snr / -8

    def _norm(self, t: Tensor) -> Tensor:
        """Returns sqrt(sigma^2 + alpha^2 sigma_data^2), the standard deviation of x_t."""
        return torch.hypot(self.schedule.sigma(t), self.schedule.alpha(t) * self.sigma_data)

    def _map(self, t: Tensor) -> _Map:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        match self.parameterization:
            case "v":
                return _velocity_map(alpha, sigma, *self.schedule.derivatives(t))
            case "eps":
                eps_in, eps_out, x_in, x_out = _direct_map(sigma, alpha)
                return _Map(x_in, x_out, eps_in, eps_out)
            case "x":
                return _direct_map(alpha, sigma)
            case "edm":
                return _edm_map(alpha, sigma, self._norm(t), self.sigma_data)


def _velocity_map(alpha: Tensor, sigma: Tensor, d_alpha: Tensor, d_sigma: Tensor) -> _Map:
    """F = alpha' x + sigma' eps, solved together with x_t = alpha x + sigma eps."""
    det = alpha * d_sigma - sigma * d_alpha
    return _Map(d_sigma / det, -sigma / det, -d_alpha / det, alpha / det)


def _direct_map(own: Tensor, other: Tensor) -> _Map:
    """F is one of the pair, with scale `own`; the remainder of x_t over `other` is the second.

    Where `other` falls below the floor, F counts only by other / floor and x_t / own takes the
    rest, so that own first + other second = x_t still holds.
    """
    divisor = other.clamp(min=_DIVISOR_FLOOR)
    share = other / divisor
    rest = torch.where(share < 1, (1 - share) / own.clamp(min=_DIVISOR_FLOOR), 0)
    return _Map(rest, share, 1 / divisor, -own / divisor)


def _edm_map(alpha: Tensor, sigma: Tensor, norm: Tensor, sigma_data: float) -> _Map:
    """Karras et al. 2022, Table 1, arXiv:2206.00364, multiplied out so that nothing is divided.

    With sigma_edm = sigma / alpha and input x_t / alpha,
    c_skip / alpha = alpha sigma_data^2 / norm^2,  c_out = sigma sigma_data / norm.
    """
    return _Map(
        alpha * (sigma_data / norm) ** 2,
        sigma * (sigma_data / norm),
        sigma / norm**2,
        -alpha * (sigma_data / norm),
    )
