"""How much the optimal denoisers of two noise levels agree.

On a path x_t = alpha_t x + sigma_t eps with posterior means m_t = E[x | x_t] and r_t = alpha_t /
sigma_t, the optimal noise estimate is eps*_t = eps + (x - m_t) r_t. Agreement is the share of
pixels whose estimates differ by eta at most (arXiv 2312.09181, eq. 5), mean over draws (x, eps):

    space "eps":  S(a, b) = E P( |(x - m_a) r_a - (x - m_b) r_b| <= eta )
    space "x":    S(a, b) = E P( |m_a - m_b| <= eta )

Agreement with the two ends compares m_t with its limits, x as t -> 0 and the prior mean as t -> 1
(the mean of the data; with a memory E[x | snippet], the snippet being that of the draw's x):

    to_clean(t) = E P( |m_t - x| r_t <= eta ),   to_noise(t) = E P( |m_t - prior| r_t <= eta )

with r_t = 1 in space "x". The first is S(t, 0). The second is S(t, 1) in space "x" alone: where
alpha_1 = 0, eps*_1 = eps = eps*_0, so that in space "eps" S(t, 1) = S(t, 0) and would say nothing
of the noise end. There, as in the paper's code, eps*_t is compared with the estimate that knows
only the prior mean, at the same x_t.

A noise estimate has unit variance whatever the data, so eta is a plain number in space "eps". In
space "x" it is a share of the data's range R, |m_a - m_b| <= eta R: 2/255 are two steps of 8-bit
pixels, be the data in [0, 1] (R = 1, as in the released code) or in [-1, 1] (R = 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stratagem import randomness
from stratagem.clustering.optimal_denoiser import OptimalDenoiser
from stratagem.errors import InputError

__all__ = ["Similarity", "pairwise_agreement", "similarity"]

# Numbers in one batch of paths (B, T, n): 32 MiB of float32.
_BATCH_NUMBERS = 1 << 23
# Numbers compared at once; as float32 4 MiB, which stay in a CPU's cache.
_PAIR_NUMBERS = 1 << 20


@dataclass(frozen=True)
class Similarity:
    """Agreement of the optimal denoisers over a grid of T times, mean over (x, eps) draws.

    Attributes:
        times: Shape (T,), increasing.
        log_snr: Shape (T,).
        to_clean: Agreement with the clean end, shape (T,).
        to_noise: Agreement with the noise end, shape (T,).
        to_clean_se: Standard error of `to_clean` over the draws, shape (T,).
        to_noise_se: Standard error of `to_noise`, shape (T,).
        matrix: Agreement S(a, b) of each pair of times, shape (T, T), symmetric, 1 on the diagonal.
    """

    times: Tensor
    log_snr: Tensor
    to_clean: Tensor
    to_noise: Tensor
    to_clean_se: Tensor
    to_noise_se: Tensor
    matrix: Tensor


def similarity(
    denoiser: OptimalDenoiser,
    times: Tensor,
    *,
    num_samples: int,
    eta: float,
    seed: int,
    space: Literal["eps", "x"] = "eps",
    data_range: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Similarity:
    """Estimates the agreement of the optimal denoisers at `times`.

    Sample k is data point order[k mod N] of a random order with its own noise, common to all times,
    so it does not depend on `num_samples` or on the batches.

    Args:
        denoiser: The optimal denoiser; samples are its data points, told their own snippets if it
            has a memory.
        times: Increasing times with finite log-SNR, shape (T,).
        num_samples: Number of (x, eps) draws, at least 2.
        eta: Largest difference that counts as agreement, see the module's text.
        seed: Seed of the draws.
        space: Whether noise estimates ("eps") or posterior means ("x") are compared.
        data_range: Highest minus lowest value of the data, the unit of eta in space "x"; 1 by
            default. For uint8 data, which stand for [-1, 1], it is 2.
        progress: Called with (samples done, samples in all) after each batch.

    Raises:
        InputError: If a setting is out of range, or a range is given that has no effect.

    Reference: arXiv 2312.09181, eq. 5.
    """
    bound = _bound(eta, space, data_range, num_samples)
    log_snr = denoiser.schedule.log_snr(times.double())
    scale = (log_snr / 2).exp() if space == "eps" else torch.ones_like(log_snr)
    scale = scale.to(denoiser.device, denoiser.dtype)[:, None]
    clean, noise = [], []
    pairs = torch.zeros(len(times), len(times), dtype=torch.float64, device=denoiser.device)
    batch = max(1, _BATCH_NUMBERS // (len(times) * denoiser.rows.shape[1]))
    for start in range(0, num_samples, batch):
        draws = range(start, min(start + batch, num_samples))
        x, eps, memory = _draw(denoiser, draws, seed)
        means = denoiser.along(x, eps, times, memory).flatten(2)
        prior = denoiser.prior_mean(memory, len(draws)).flatten(1)[:, None]
        error = (means - x.flatten(1)[:, None]).mul_(scale)
        pairs += pairwise_agreement(error, bound) * len(draws)
        clean.append((error.abs_() <= bound).sum(dim=2))
        noise.append((means.sub_(prior).mul_(scale).abs_() <= bound).sum(dim=2))
        if progress is not None:
            progress(draws.stop, num_samples)
    width = denoiser.rows.shape[1]
    to_clean, to_clean_se = _mean_and_error(torch.cat(clean).double() / width)
    to_noise, to_noise_se = _mean_and_error(torch.cat(noise).double() / width)
    matrix = (pairs / num_samples).cpu()
    return Similarity(times, log_snr, to_clean, to_noise, to_clean_se, to_noise_se, matrix)


def pairwise_agreement(values: Tensor, eta: float) -> Tensor:
    """Returns the share of entries that differ by eta at most, between each two of T times.

    Args:
        values: What is compared, shape (B, T, n).
        eta: Largest difference that counts as agreement.

    Returns:
        Mean over B and n, shape (T, T), float64, symmetric.

    Example:
        >>> pairwise_agreement(torch.tensor([[[0.0, 1.0], [0.0, 3.0]]]), 0.5).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    num_times, width = values.shape[1:]
    count = torch.zeros(num_times, num_times, dtype=torch.float64, device=values.device)
    for part in values.split(max(1, _PAIR_NUMBERS // (num_times * width))):
        for a in range(num_times):
            agree = (part[:, a:] - part[:, a : a + 1]).abs_().le_(eta)
            count[a, a:] += agree.sum(dim=2).double().sum(dim=0)
    return torch.maximum(count, count.T) / (len(values) * width)


def _draw(
    denoiser: OptimalDenoiser, draws: range, seed: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns data points and noise of the samples in `draws`, (B, *shape), and their snippets."""
    num = len(denoiser.rows)
    index = randomness.permutation(num, seed, "similarity data")[torch.tensor(draws) % num]
    noise = [randomness.normal(denoiser.shape, seed, "similarity noise", k) for k in draws]
    x, memory = denoiser.points(index)
    return x, torch.stack(noise).to(x), memory


def _bound(eta: float, space: str, data_range: float | None, num_samples: int) -> float:
    """Returns the largest difference that counts as agreement, in units of what is compared."""
    if not eta > 0:
        raise InputError(f"eta = {eta}: give a number above 0")
    if num_samples < 2:
        raise InputError(f"{num_samples} samples: ask for at least 2, better 100 or more")
    if data_range is None:
        return eta
    if space == "eps":
        raise InputError('data_range has no effect in space "eps": leave it out or use space "x"')
    if not 0 < data_range < math.inf:
        raise InputError(f"data_range = {data_range}: give highest minus lowest value, above 0")
    return eta * data_range


def _mean_and_error(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean over samples and its standard error, (K, T) -> (T,), (T,)."""
    error = shares.std(dim=0) / len(shares) ** 0.5
    return shares.mean(dim=0).cpu(), error.cpu()
