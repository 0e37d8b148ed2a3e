"""Guidance: predictors made of predictors, sharper than the ones they are made of.

    D = D_ref + scale (D_main - D_ref)      for D = x and D = eps alike

    ClassifierFree   D_ref: the same network without its condition      arXiv 2207.12598
    Autoguidance     D_ref: a weaker network with the same condition    arXiv 2406.02507
    Interval         guided inside a range of times, plain outside      arXiv 2404.07724

Each wraps a predictor and is one, so samplers need not know. The weights of the sum are 1 - scale
and scale; they add up to 1, so alpha x + sigma eps = x_t holds after as before, and since the
velocity is linear in (x, eps), guiding it is the same thing. Scale 1 is the main network, 0 the
reference, above 1 an extrapolation.

The published samplers of GMem guide all channels; those of SiT and LightningDiT only the first 3,
a leftover of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stratagem.denoiser import Prediction, Predictor
from stratagem.errors import InputError
from stratagem.schedule import NoiseSchedule

__all__ = ["Autoguidance", "ClassifierFree", "Interval"]

_NULLABLE = ("memory", "label")


@dataclass(frozen=True)
class ClassifierFree:
    """Extrapolates from the prediction without a condition to the one with it.

    D = D(x_t, null) + scale (D(x_t, condition) - D(x_t, null))

    The null of memory is the zero vector, that of a label its own class (see `nets.layers`). Both
    predictions are one call of the network with 2B rows, unless there is a label whose null is not
    told: then they are two calls.

    Reference: Ho & Salimans 2022, Eq. 6, arXiv:2207.12598 (there w = scale - 1).

    Attributes:
        denoiser: The predictor.
        scale: Strength; 1 is the conditional prediction, 0 the unconditional one.
        channels: How many channels are guided, the first ones; None for all. The others stay as
            the condition alone has them.
        null_label: The label that means none, which is the network's number of classes.
    """

    denoiser: Predictor
    scale: float
    channels: int | None = None
    null_label: int | None = None

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule of the predictor."""
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, **condition: Any) -> Prediction:
        """Predicts from x_t (B, *) at t, shape () or (B,).

        Raises:
            InputError: If there is neither memory nor label.
        """
        given = {name for name in _NULLABLE if condition.get(name) is not None}
        if not given:
            raise InputError("guidance has no effect without memory or label: leave it out")
        nulls = {name: self._null(name, condition[name]) for name in given}
        if all(null is not None for null in nulls.values()):
            num = len(x_t)
            double = {
                name: _stack(value, nulls.get(name, value), num)
                for name, value in condition.items()
            }
            both = self.denoiser(torch.cat((x_t, x_t)), _stack(t, t, num), **double)
            halves = zip(*(part.chunk(2) for part in both), strict=True)
            main, reference = (Prediction(*half) for half in halves)
        else:
            main = self.denoiser(x_t, t, **condition)
            reference = self.denoiser(x_t, t, **(condition | dict.fromkeys(given)))
        return _extrapolate(reference, main, self.scale, self.channels)

    def _null(self, name: str, value: Tensor) -> Tensor | None:
        if name == "memory":
            return torch.zeros_like(value)
        return None if self.null_label is None else torch.full_like(value, self.null_label)


@dataclass(frozen=True)
class Autoguidance:
    """Extrapolates from a weaker network to the main one.

    D = D_weak(x_t, condition) + scale (D(x_t, condition) - D_weak(x_t, condition))

    Reference: Karras et al. 2024, arXiv:2406.02507.

    Attributes:
        denoiser: The main predictor.
        weak: A smaller or less trained one of the same data, schedule and conditions.
        scale: Strength; 1 is the main prediction, 0 the weak one.

    Raises:
        InputError: If the schedules differ.
    """

    denoiser: Predictor
    weak: Predictor
    scale: float

    def __post_init__(self) -> None:
        if self.denoiser.schedule != self.weak.schedule:
            raise InputError(
                f"autoguidance needs one schedule: the main network has {self.denoiser.schedule}, "
                f"the weak one {self.weak.schedule}"
            )

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule of both predictors."""
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, **condition: Any) -> Prediction:
        """Predicts from x_t (B, *) at t, shape () or (B,)."""
        main, weak = self.denoiser(x_t, t, **condition), self.weak(x_t, t, **condition)
        return _extrapolate(weak, main, self.scale, None)


@dataclass(frozen=True)
class Interval:
    """Guides where low <= t <= high, and is the main predictor alone elsewhere.

    Outside, the reference is not computed. GMem's and LightningDiT's "interval start" s in their
    time is high = 1 - s here. Past the end of an interval the official GMem returns the prediction
    without condition; here both sides of the interval are conditional.

    Reference: Kynkaanniemi et al. 2024, arXiv:2404.07724.

    Attributes:
        guided: The guided predictor.
        low: Smallest guided time.
        high: Largest guided time.

    Raises:
        InputError: If not 0 <= low <= high <= 1.
    """

    guided: ClassifierFree | Autoguidance
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise InputError(f"guidance interval {self.low} to {self.high} does not lie in 0 to 1")

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule of the guided predictor."""
        return self.guided.schedule

    def __call__(self, x_t: Tensor, t: Tensor, **condition: Any) -> Prediction:
        """Predicts from x_t (B, *) at t, shape () or (B,); each row by its own time."""
        inside = (t >= self.low) & (t <= self.high)
        if inside.all():
            return self.guided(x_t, t, **condition)
        if not inside.any():
            return self.guided.denoiser(x_t, t, **condition)
        x, eps = torch.empty_like(x_t), torch.empty_like(x_t)
        for rows, predict in ((inside, self.guided), (~inside, self.guided.denoiser)):
            own = {name: _rows(value, rows) for name, value in condition.items()}
            x[rows], eps[rows] = predict(x_t[rows], t[rows], **own)
        return Prediction(x, eps)


def _extrapolate(
    reference: Prediction, main: Prediction, scale: float, channels: int | None
) -> Prediction:
    """Returns reference + scale (main - reference), in the first channels only if so wanted."""
    guided = (torch.lerp(r, m, scale) for r, m in zip(reference, main, strict=True))
    if channels is None:
        return Prediction(*guided)
    parts = ((g[:, :channels], m[:, channels:]) for g, m in zip(guided, main, strict=True))
    return Prediction(*(torch.cat(pair, dim=1) for pair in parts))


def _stack(first: Any, second: Any, num: int) -> Any:
    """Puts two batches behind each other; what is not one value per row stays as it is."""
    if isinstance(first, Tensor) and first.shape[:1] == (num,):
        return torch.cat((first, second))
    return first


def _rows(value: Any, rows: Tensor) -> Any:
    """Selects rows of what has one value per row."""
    if isinstance(value, Tensor) and value.shape[:1] == rows.shape:
        return value[rows]
    return value
