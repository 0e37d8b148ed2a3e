"""The optimal denoiser of a finite data set, in closed form.

    E[x | x_t] = sum_i w_i y_i,    w_i = softmax_i( -|x_t - alpha_t y_i|^2 / (2 sigma_t^2) )

(arXiv 2312.09181, eq. 4.) It is the minimiser of the denoising loss over all functions, so it tells
how the task itself changes with the noise level, before any network is trained. A network with a
memory has another task, E[x | x_t, m], for its snippet m favours the points whose rows are near:

    w_i = softmax_i( -|x_t - alpha_t y_i|^2 / (2 sigma_t^2) + (<m_i, m> - 1) / temperature )

The squared distance is one matrix product, since |x_t|^2 is common to all i and drops out:

    logit_i = ( alpha <x_t, y_i> - alpha^2 |y_i|^2 / 2 ) / sigma^2

At high SNR this is a small difference of large numbers, so logits are float64 whatever the data.
Along a path x_t = alpha x + sigma eps the inner products are <x, y_i> and <eps, y_i> at every t:

    logit_i(t) = r^2 (<x, y_i> - |y_i|^2 / 2) + r <eps, y_i> + kernel_i,    r = alpha_t / sigma_t

so a path of T times costs two inner products per data point and one (T,N) x (N,n) product. The data
are read in chunks, so that they may be a mapped file; nothing of size (queries, N, n) exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from stratagem.clustering.snippet_kernel import SnippetKernel
from stratagem.errors import InputError
from stratagem.schedule import NoiseSchedule

__all__ = ["OptimalDenoiser"]

# Weights under e^-80 of the largest change no digit; exp of anything deeper is denormal in float32,
# which CPUs compute a hundred times slower.
_CUT = -80.0
# sigma is kept above alpha times this, so that both ends of the noise axis are finite.
_SMALLEST_RATIO = 1e-12
# Numbers in one chunk of the data. On a CPU 3 MiB of float32: small, so that it stays in cache and
# often has no weight at all. Elsewhere large, so that starting an operation costs nothing.
_CHUNK_NUMBERS = 3 << 18
_LARGE_CHUNK_NUMBERS = 1 << 25
# Points in a chunk: with fewer, reading and writing the (T, n) means outweighs the products.
_LEAST_CHUNK = 128
# Inner products of paths with the data held at once, as float64 128 MiB.
_PRODUCT_NUMBERS = 1 << 24


class OptimalDenoiser:
    """E[x | x_t], or E[x | x_t, snippet], under the empirical distribution of a data set.

    The ends are the limits: alpha = 0 gives the mean of the data, sigma = 0 the data point nearest
    to x_t / alpha (the mean of the nearest ones, if they are equal). Temperature infinity gives the
    denoiser without memory, temperature 0 the point to which the snippet belongs.

    Args:
        data: The data points y_i, shape (N, *shape), N >= 1: floating point of any width, or uint8
            pixels u, which stand for u / 127.5 - 1. Not copied; may be mapped from a file.
        schedule: Gives alpha and sigma.
        memory: The snippet m_i of each point, shape (N, D), of any length but 0. Not copied.
        temperature: How far cosines of snippets may differ without being told apart, above 0; by
            default `snippet_kernel.dropout_temperature(memory)`.
        device: Where to compute; by default where the data are.
        tolerance: Share of the softmax mass that may be left out, which saves time. Each number of
            a result is then off by at most this share of the range that the data have there.
        query_chunk: Most noisy inputs of `posterior_mean` held at once.
        data_chunk: Data points per pass; by default such that a chunk fits a CPU's cache.

    Attributes:
        mean: The mean of the data, shape (*shape).
        dtype: float64 for float64 data, else float32; the type of all results.

    Raises:
        InputError: If data hold no point, are not finite, or of another type; if there is not one
            usable snippet per point; if temperature or tolerance is out of range.

    Reference: arXiv 2312.09181, Proposition 1 and eq. 4; the kernel is ours.
    """

    def __init__(
        self,
        data: Tensor,
        schedule: NoiseSchedule,
        *,
        memory: Tensor | None = None,
        temperature: float | None = None,
        device: torch.device | str | None = None,
        tolerance: float = 0.0,
        query_chunk: int = 1024,
        data_chunk: int | None = None,
    ) -> None:
        if not (data.is_floating_point() or data.dtype == torch.uint8):
            raise InputError(f"data are {data.dtype}: convert them to float32 in [-1, 1] or uint8")
        if data.ndim < 2 or data.numel() == 0:
            raise InputError(f"data of shape {tuple(data.shape)} hold no point: need (N, *shape)")
        if not 0 <= tolerance < 1:
            raise InputError(f"tolerance = {tolerance}: give a share of the mass in [0, 1)")
        self.shape = data.shape[1:]
        self.schedule = schedule
        self.rows = data.detach().reshape(len(data), -1)
        self.dtype = torch.float64 if data.dtype == torch.float64 else torch.float32
        self.device = torch.device(data.device if device is None else device)
        # N rows of weight tolerance / N each sum to the tolerance.
        self.cut = max(_CUT, math.log(tolerance / len(data))) if tolerance else _CUT
        self.query_chunk = query_chunk
        numbers = _CHUNK_NUMBERS if self.device.type == "cpu" else _LARGE_CHUNK_NUMBERS
        fitting = numbers // max(self.rows.shape[1], query_chunk)
        self.data_chunk = data_chunk or max(_LEAST_CHUNK, fitting)
        self.half_norms, self.mean = self._moments()
        self.kernel = None
        if memory is not None:
            if len(memory) != len(data):
                raise InputError(f"{len(memory)} snippets for {len(data)} points: give one each")
            self.kernel = SnippetKernel(memory, temperature, self.device)
        elif temperature is not None:
            raise InputError(f"temperature = {temperature} has no effect without a memory")

    def posterior_mean(self, x_t: Tensor, t: Tensor, memory: Tensor | None = None) -> Tensor:
        """Returns E[x | x_t, snippet] by arXiv 2312.09181, eq. 4.

        Args:
            x_t: Noisy inputs, shape (B, *shape).
            t: Their times, shape (B,) or ().
            memory: Their snippets, shape (B, D), exactly if the denoiser has a memory.

        Returns:
            Shape (B, *shape).

        Raises:
            InputError: If the snippets are not as the denoiser needs them.
        """
        alpha, sigma = self._levels(t.expand(len(x_t)))
        gain, snr = alpha / sigma.square(), (alpha / sigma).square()
        queries = x_t.reshape(len(x_t), -1).to(self.device)
        return self._means(queries, gain, snr, self._snippets(memory, len(x_t)))

    def prior_mean(self, memory: Tensor | None, num: int) -> Tensor:
        """Returns what is expected of B = num points before x_t is seen, shape (B, *shape).

        That is the limit of pure noise: the mean of the data, or E[x | snippet].

        Args:
            memory: The snippets, shape (B, D), exactly if the denoiser has a memory.
            num: How many points.

        Raises:
            InputError: If the snippets are not as the denoiser needs them.
        """
        snippets = self._snippets(memory, num)
        if snippets is None:
            return self.mean.expand(num, *self.shape)
        nothing = snippets.new_zeros(num, self.rows.shape[1])
        return self._means(nothing, nothing[:, 0], nothing[:, 0], snippets)

    def along(self, x: Tensor, eps: Tensor, times: Tensor, memory: Tensor | None = None) -> Tensor:
        """Returns E[x | x_t, snippet] at all times of the paths x_t = alpha x + sigma eps.

        Args:
            x: Clean ends, shape (B, *shape); need not be data points.
            eps: Noise, shape (B, *shape).
            times: Times common to all paths, shape (T,).
            memory: The snippets of the paths, shape (B, D), exactly if the denoiser has a memory.

        Returns:
            Shape (B, T, *shape).

        Raises:
            InputError: If the snippets are not as the denoiser needs them.
        """
        snippets = self._snippets(memory, len(x))
        alpha, sigma = self._levels(times)
        ratio = alpha / sigma
        powers = torch.stack([ratio.square(), ratio, torch.ones_like(ratio)], dim=1)
        means = torch.zeros(
            len(x), len(times), self.rows.shape[1], dtype=self.dtype, device=self.device
        )
        for part in _slices(len(x), max(1, _PRODUCT_NUMBERS // (3 * len(self.rows)))):
            own = None if snippets is None else snippets[part]
            self._fill_paths(means[part], powers, self._path_products(x[part], eps[part], own))
        return means.reshape(len(x), len(times), *self.shape)

    def points(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns data points (B, *shape) as numbers, and their snippets (B, D) if there are any.

        Args:
            index: Which, shape (B,), int64.
        """
        numbers = self._numbers(self.rows[index.to(self.rows.device)])
        memory = None if self.kernel is None else self.kernel.memory
        snippets = None if memory is None else memory[index.to(memory.device)]
        return numbers.reshape(-1, *self.shape), snippets

    def _means(self, x_t: Tensor, gain: Tensor, snr: Tensor, snippets: Tensor | None) -> Tensor:
        """Posterior means of (B, n) inputs with logits gain <x_t, y> - snr |y|^2 / 2 + kernel."""
        means = x_t.new_empty(x_t.shape, dtype=self.dtype)
        for part in _slices(len(x_t), self.query_chunk):
            queries, weight = x_t[part].double() * gain[part, None], -snr[part, None]
            running = _RunningMean(means[part], self.cut)
            for where, rows in self._chunks():
                logits = torch.addmm(weight * self.half_norms[where], queries, rows.double().T)
                if self.kernel is not None and snippets is not None:
                    logits += self.kernel(snippets[part], where)
                running.add(logits, rows)
            means[part] = running.value()
        return means.reshape(-1, *self.shape)

    def _path_products(self, x: Tensor, eps: Tensor, snippets: Tensor | None) -> Tensor:
        """Returns the coefficients of r^2, r and 1 in the logits of B paths, (B, 3, N), float64.

        They are differences to those of the point nearest to x, which has all the weight in the
        end: then no logit that counts is large, however large r is.
        """
        queries = torch.stack([x, eps], dim=1).reshape(2 * len(x), -1).to(self.device).double()
        products = queries.new_zeros(len(x), 3, len(self.rows))
        for part, rows in self._chunks():
            products[:, :2, part] = (queries @ rows.double().T).reshape(len(x), 2, -1)
            if self.kernel is not None and snippets is not None:
                products[:, 2, part] = self.kernel(snippets, part)
        products[:, 0] -= self.half_norms
        nearest = products[:, 0].argmax(dim=1)[:, None, None].expand(-1, 3, 1)
        return products.sub_(products.gather(2, nearest))

    def _fill_paths(self, means: Tensor, powers: Tensor, products: Tensor) -> None:
        """Adds the posterior means of B paths to `means` (B, T, n), given their products."""
        peaks, runs = [], []
        for own in products:
            # Logits are cheap, so the largest is found beforehand; then at high SNR, where one
            # point has all the weight, the product below runs over the few chunks that matter.
            tops = torch.stack([(powers @ own[:, part]).amax(dim=1) for part in self._parts()])
            peaks.append(tops.amax(dim=0)[:, None])
            runs.append(_runs(tops > peaks[-1][:, 0] + self.cut))
        totals = means.new_zeros(*means.shape[:2], 1)
        for number, (part, rows) in enumerate(self._chunks()):
            for mean, total, own, peak, run in zip(
                means, totals, products, peaks, runs, strict=True
            ):
                live = slice(*run[number])
                if live.start == live.stop:
                    continue
                gaps = torch.addmm(-peak[live], powers[live], own[:, part])
                weights = gaps.to(self.dtype).clamp_(min=_CUT).exp_()
                total[live] += weights.sum(dim=1, keepdim=True)
                mean[live].addmm_(weights, rows)
        means /= totals

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns alpha and sigma in float64, sigma kept off zero."""
        t = t.to(self.device, torch.float64)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return alpha, torch.maximum(sigma, alpha * _SMALLEST_RATIO)

    def _snippets(self, memory: Tensor | None, num: int) -> Tensor | None:
        """Checks the snippets of B = num queries and makes them unit rows, float64."""
        if self.kernel is not None and memory is not None:
            return self.kernel.queries(memory, num)
        if self.kernel is None and memory is None:
            return None
        need = "no memory" if self.kernel is None else "the memory of each query"
        raise InputError(f"this optimal denoiser takes {need}: give memory to both or neither")

    def _parts(self) -> Iterator[slice]:
        """Yields where each chunk of the data lies."""
        return _slices(len(self.rows), self.data_chunk)

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields where each chunk lies, and the chunk as numbers, shape (<= data_chunk, n)."""
        for part in self._parts():
            yield part, self._numbers(self.rows[part])

    def _numbers(self, rows: Tensor) -> Tensor:
        """Returns stored rows as floating-point numbers on the device."""
        numbers = rows.to(self.device).to(self.dtype)
        return numbers / 127.5 - 1 if rows.dtype == torch.uint8 else numbers

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Returns |y_i|^2 / 2, shape (N,), float64, and the mean of the data, shape (*shape)."""
        halves = []
        total = torch.zeros(self.rows.shape[1], dtype=torch.float64, device=self.device)
        for _, rows in self._chunks():
            exact = rows.double()
            halves.append(exact.square().sum(dim=1) / 2)
            total += exact.sum(dim=0)
        if not torch.isfinite(total).all():
            raise InputError("data hold NaN or infinity: remove such images first")
        return torch.cat(halves), (total / len(self.rows)).to(self.dtype).reshape(self.shape)


def _slices(num: int, size: int) -> Iterator[slice]:
    """Yields slices of at most `size` that cover 0 .. num-1."""
    return (slice(i, min(i + size, num)) for i in range(0, num, size))


def _runs(live: Tensor) -> list[list[int]]:
    """Returns the run from the first to the last that is live, and 0, 0 where none is.

    One run is a view where the live ones alone would be a copy; live (C, T) -> C pairs.

    Example:
        >>> _runs(torch.tensor([[False, True, False, True, False], [False] * 5]))
        [[1, 4], [0, 0]]
    """
    first, last = live.byte().argmax(dim=1), live.byte().flip(1).argmax(dim=1)
    stop = torch.where(live.any(dim=1), live.shape[1] - last, 0)
    return torch.stack([first, stop], dim=1).tolist()


class _RunningMean:
    """Softmax-weighted means of rows that arrive chunk by chunk (running log-sum-exp).

    Args:
        like: A tensor of the shape (Q, n), the type and the device of the means.
        cut: Chunks whose logits lie so far below the largest before them are passed over.
    """

    def __init__(self, like: Tensor, cut: float) -> None:
        self.cut = cut
        self.peak = like.new_full((len(like),), -torch.inf, dtype=torch.float64)
        self.total = like.new_zeros(len(like), 1)
        self.sum = torch.zeros_like(like)

    def add(self, logits: Tensor, rows: Tensor) -> None:
        """Adds rows (M, n) with logits (Q, M), float64."""
        top = logits.amax(dim=1)
        ((first, stop),) = _runs((top > self.peak + self.cut)[None])
        run = slice(first, stop)
        peak = torch.maximum(self.peak[run], top[run])
        scale = (self.peak[run] - peak).clamp(min=_CUT).exp().to(self.sum.dtype)[:, None]
        gaps = (logits[run] - peak[:, None]).clamp_(min=_CUT)
        weights = gaps.to(self.sum.dtype).exp_()
        self.peak[run] = peak
        self.total[run] = self.total[run] * scale + weights.sum(dim=1, keepdim=True)
        self.sum[run].mul_(scale).addmm_(weights, rows)

    def value(self) -> Tensor:
        """Returns the means, shape (Q, n)."""
        return self.sum / self.total
