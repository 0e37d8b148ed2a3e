"""The optimal denoiser of a finite data set, in closed form.

    E[x | x_t] = sum_i w_i y_i,    w_i = softmax_i( -|x_t - alpha_t y_i|^2 / (2 sigma_t^2) )

(arXiv 2312.09181, eq. 4.) It is the minimiser of the denoising loss over all functions, so it tells
how the task itself changes with the noise level, before any network is trained.

The squared distance is one matrix product, since |x_t|^2 is common to all i and drops out:

    logit_i = ( alpha <x_t, y_i> - alpha^2 |y_i|^2 / 2 ) / sigma^2

At high SNR this is a small difference of large numbers, so logits are float64 whatever the data.
Along a path x_t = alpha x + sigma eps the inner products are <x, y_i> and <eps, y_i> at every t:

    logit_i(t) = r^2 (<x, y_i> - |y_i|^2 / 2) + r <eps, y_i>,    r = alpha_t / sigma_t

so a path of T times costs two inner products per data point and one (T,N) x (N,n) product.
The data are visited in chunks with a running log-sum-exp; nothing of size (queries, N, n) exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stratagem.errors import InputError
from stratagem.schedule import NoiseSchedule

__all__ = ["OptimalDenoiser"]

# Weights under e^-80 of the largest change no digit; exp of anything deeper is denormal in float32,
# which CPUs compute a hundred times slower.
_CUT = -80.0
# sigma is kept above alpha times this, so that both ends of the noise axis are finite.
_SMALLEST_RATIO = 1e-12
# Numbers in one chunk of the data, as float64 4 MiB: much larger ones leave a CPU's cache.
_CHUNK_NUMBERS = 1 << 19


class OptimalDenoiser:
    """E[x | x_t] under the empirical distribution of a data set.

    The ends are the limits: alpha = 0 gives the mean of the data, sigma = 0 the data point nearest
    to x_t / alpha (the mean of the nearest ones, if they are equal).

    Args:
        data: The data points y_i, shape (N, *shape), float32 or float64, N >= 1. Not copied.
        schedule: Gives alpha and sigma.
        query_chunk: Most noisy inputs held at once.
        data_chunk: Data points per pass; by default such that a chunk fits a CPU's cache.

    Attributes:
        mean: The mean of the data, shape (*shape).

    Raises:
        InputError: If data hold no point, are not finite, or neither float32 nor float64.

    Reference: arXiv 2312.09181, Proposition 1 and eq. 4.
    """

    def __init__(
        self,
        data: Tensor,
        schedule: NoiseSchedule,
        *,
        query_chunk: int = 1024,
        data_chunk: int | None = None,
    ) -> None:
        if data.dtype not in (torch.float32, torch.float64):
            raise InputError(f"data are {data.dtype}: convert them to float32 in [-1, 1] first")
        if data.ndim < 2 or data.numel() == 0:
            raise InputError(f"data of shape {tuple(data.shape)} hold no point: need (N, *shape)")
        self.shape = data.shape[1:]
        self.schedule = schedule
        self.rows = data.detach().reshape(len(data), -1)
        self.query_chunk = query_chunk
        widest = max(self.rows.shape[1], query_chunk)
        self.data_chunk = data_chunk or max(1, _CHUNK_NUMBERS // widest)
        self.half_norms, self.mean = self._moments()

    def posterior_mean(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns E[x | x_t] by arXiv 2312.09181, eq. 4.

        Args:
            x_t: Noisy inputs, shape (B, *shape).
            t: Their times, shape (B,) or ().

        Returns:
            Shape (B, *shape), like the data.
        """
        means = torch.empty(len(x_t), self.rows.shape[1], dtype=self.rows.dtype, device=x_t.device)
        times = t.expand(len(x_t))
        for i in range(0, len(x_t), self.query_chunk):
            part = slice(i, i + self.query_chunk)
            means[part] = self._posterior_mean(x_t[part], times[part])
        return means.reshape(x_t.shape)

    def optimal_eps(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns E[eps | x_t] = (x_t - alpha E[x | x_t]) / sigma, shape (B, *shape); sigma > 0.

        Once sigma nears the rounding of x_t, no digit of the noise is left in x_t, nor in this.
        On a path, eps + (x - E[x | x_t]) alpha / sigma of `along` has no such loss.
        """
        like = (-1, *[1] * len(self.shape))
        alpha = self.schedule.alpha(t.double()).reshape(like)
        sigma = self.schedule.sigma(t.double()).reshape(like)
        gap = x_t.double() - alpha * self.posterior_mean(x_t, t).double()
        return (gap / sigma).to(self.rows.dtype)

    def along(self, x: Tensor, eps: Tensor, times: Tensor) -> Tensor:
        """Returns E[x | x_t] at all times of the paths x_t = alpha x + sigma eps.

        Args:
            x: Clean ends, shape (B, *shape); need not be data points.
            eps: Noise, shape (B, *shape).
            times: Times common to all paths, shape (T,).

        Returns:
            Shape (B, T, *shape), like the data.
        """
        alpha, sigma = self._levels(times)
        ratio = alpha / sigma
        powers = torch.stack([ratio.square(), ratio], dim=1)
        means = torch.empty(
            len(x), len(times), self.rows.shape[1], dtype=self.rows.dtype, device=x.device
        )
        step = max(1, self.query_chunk // len(times))
        for i in range(0, len(x), step):
            products = self._path_products(x[i : i + step], eps[i : i + step])
            self._fill_paths(means[i : i + step], powers, products)
        return means.reshape(len(x), len(times), *self.shape)

    def _posterior_mean(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Visits the data once for one chunk of queries, shape (Q, *shape) -> (Q, n)."""
        alpha, sigma = self._levels(t)
        queries = x_t.reshape(len(x_t), -1).double() * (alpha / sigma.square())[:, None]
        snr = (alpha / sigma).square()[:, None]
        running = _RunningMean(torch.full_like(alpha, -torch.inf), queries.shape[1], self.rows)
        for part, rows in self._chunks():
            logits = torch.addmm(snr * -self.half_norms[part], queries, rows.double().T)
            running.add(logits, rows)
        return running.value()

    def _path_products(self, x: Tensor, eps: Tensor) -> Tensor:
        """Returns <x, y_i> - |y_i|^2 / 2 and <eps, y_i>, shape (B, 2, N), float64."""
        queries = torch.stack([x, eps], dim=1).reshape(2 * len(x), -1).double()
        products = queries.new_empty(2 * len(x), len(self.rows))
        for part, rows in self._chunks():
            products[:, part] = queries @ rows.double().T
        products = products.reshape(len(x), 2, -1)
        products[:, 0] -= self.half_norms
        return products

    def _fill_paths(self, means: Tensor, powers: Tensor, products: Tensor) -> None:
        """Writes the posterior means of B paths into `means` (B, T, n), given their products."""
        running = []
        for own in products:
            # The largest logit is cheap to know beforehand; then at high SNR, where one point has
            # all the weight, the product below runs over the few chunks that matter.
            tops = [(powers @ own[:, part]).amax(dim=1) for part, _ in self._chunks()]
            peak = torch.stack(tops).amax(dim=0)
            # A hair lower, so that rounding never leaves a path without a point.
            running.append(_RunningMean(peak - 1e-12 * peak.abs(), means.shape[-1], self.rows))
        for part, rows in self._chunks():
            for path, own in zip(running, products, strict=True):
                path.add(powers @ own[:, part], rows)
        for mean, path in zip(means, running, strict=True):
            mean.copy_(path.value())

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns alpha and sigma in float64, sigma kept off zero."""
        t = t.to(self.rows.device, torch.float64)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return alpha, torch.maximum(sigma, alpha * _SMALLEST_RATIO)

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields where each chunk of the data lies, and the chunk, shape (<= data_chunk, n)."""
        for i in range(0, len(self.rows), self.data_chunk):
            part = slice(i, i + self.data_chunk)
            yield part, self.rows[part]

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Returns |y_i|^2 / 2, shape (N,), float64, and the mean of the data, shape (*shape)."""
        halves, total = [], torch.zeros_like(self.rows[0], dtype=torch.float64)
        for _, rows in self._chunks():
            exact = rows.double()
            halves.append(exact.square().sum(dim=1) / 2)
            total += exact.sum(dim=0)
        if not torch.isfinite(total).all():
            raise InputError("data hold NaN or infinity: remove such images first")
        return torch.cat(halves), (total / len(self.rows)).to(self.rows.dtype).reshape(self.shape)


class _RunningMean:
    """Softmax-weighted means of rows that arrive chunk by chunk (running log-sum-exp).

    Args:
        peak: A lower bound on the largest logit of each of Q queries, shape (Q,), float64; chunks
            far below it are passed over.
        width: Length n of a row.
        like: A tensor of the rows' type.
    """

    def __init__(self, peak: Tensor, width: int, like: Tensor) -> None:
        self.peak = peak.clone()
        self.total = like.new_zeros(len(peak), 1)
        self.sum = like.new_zeros(len(peak), width)

    def add(self, logits: Tensor, rows: Tensor) -> None:
        """Adds rows (M, n) with logits (Q, M), float64."""
        top = logits.amax(dim=1)
        live = (top > self.peak + _CUT).nonzero()
        if len(live) == 0:
            return
        # One run of queries from the first to the last that the chunk can change: a view, no copy.
        run = slice(int(live[0]), int(live[-1]) + 1)
        peak = torch.maximum(self.peak[run], top[run])
        scale = (self.peak[run] - peak).clamp(min=_CUT).exp().to(self.sum.dtype)[:, None]
        gaps = (logits[run] - peak[:, None]).clamp_(min=_CUT)
        weights = gaps.to(self.sum.dtype).exp_()
        self.peak[run] = peak
        self.total[run].mul_(scale).add_(weights.sum(dim=1, keepdim=True))
        self.sum[run].mul_(scale).addmm_(weights, rows)

    def value(self) -> Tensor:
        """Returns the means, shape (Q, n)."""
        return self.sum / self.total
