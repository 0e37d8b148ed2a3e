"""Gradient affinity: closed forms, the sketch's error, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stratagem import randomness
from stratagem.clustering.affinity import gradient_affinity
from stratagem.errors import InputError
from stratagem.schedule import Linear
from tolerances import FLOAT64, assert_near


def cosine(rows: Tensor) -> Tensor:
    unit = rows / rows.norm(dim=1, keepdim=True)
    return unit @ unit.T


def quadratic(targets: Tensor, parts: list[Tensor]) -> object:
    """A loss whose gradient at time k is theta - the mean over b of targets[k, b]."""

    def loss(k: int, b: int) -> Tensor:
        theta = torch.cat([p.flatten() for p in parts])
        return (theta - targets[k, b]).square().sum() / 2

    return loss


def normal(*shape: int) -> Tensor:
    return randomness.normal(shape, 0, "test", *shape).double()


def test_linear_denoiser_has_the_closed_form() -> None:
    """eps = w x_t, one weight per pixel of deviation s: gradient 2 (w (a^2 s^2 + sg^2) - sg)."""
    times = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    s = torch.tensor([0.2, 0.7, 1.5], dtype=torch.float64)
    alpha, sigma = Linear().alpha(times)[:, None], Linear().sigma(times)[:, None]
    w = torch.tensor([0.3, -0.1, 0.5], dtype=torch.float64, requires_grad=True)
    # x and eps are +-s and +-1 in all four ways: their moments are exact.
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)

    def loss(k: int, b: int) -> Tensor:
        x, eps = signs[2 * b : 2 * b + 2, :1] * s, signs[2 * b : 2 * b + 2, 1:] * torch.ones(3)
        x_t = Linear().perturb(x, eps, times[k])
        return (w * x_t - eps).square().sum(1).mean()

    exact = 2 * (w.detach() * (alpha**2 * s**2 + sigma**2) - sigma)
    assert_near(gradient_affinity(loss, [w], 5, 2), cosine(exact), FLOAT64)


def test_gradients_are_averaged_over_batches_and_joined_over_parameters() -> None:
    parts = [torch.zeros(4, 3, dtype=torch.float64), torch.ones(5, dtype=torch.float64)]
    parts = [p.requires_grad_() for p in parts]
    idle = torch.ones(7, dtype=torch.float64, requires_grad=True)  # no part in the loss
    targets, told = normal(6, 3, 17), []
    ours = gradient_affinity(
        quadratic(targets, parts),
        [*parts, idle],
        6,
        3,
        progress=lambda done, total: told.append((done, total)),
    )
    theta = torch.cat([p.detach().flatten() for p in parts])
    assert_near(ours, cosine(theta - targets.mean(1)), FLOAT64)
    assert told == [(k, 18) for k in range(1, 19)]


@pytest.mark.parametrize("width", [256, 1024])
def test_sketch_has_the_stated_error(width: int) -> None:
    """Cosines of all sizes over 6,000 numbers in two parameters."""
    parts = [torch.zeros(50, 100, dtype=torch.float64), torch.zeros(1000, dtype=torch.float64)]
    parts = [p.requires_grad_() for p in parts]
    common, own = 1 + normal(6000), 0.5 + normal(40, 6000)
    mix = torch.linspace(-1.5, 1.5, 40, dtype=torch.float64)[:, None]
    targets = (mix * common + own)[:, None]
    exact = cosine(targets[:, 0])
    ours = gradient_affinity(quadratic(targets, parts), parts, 40, 1, width=width)
    assert_near(ours.diagonal(), torch.ones(40, dtype=torch.float64), FLOAT64)
    off = ~torch.eye(40, dtype=torch.bool)
    z = ((ours - exact) / ((1 - exact**2) / math.sqrt(width)))[off]
    assert 0.8 < z.square().mean().sqrt() < 1.2
    assert abs(z.mean()) < 0.5
    other = gradient_affinity(quadratic(targets, parts), parts, 40, 1, width=width, seed=1)
    assert (other - ours).abs().max() > 0.01


def test_each_parameter_has_its_own_buckets() -> None:
    """With common ones two parameters of opposite gradients would cancel."""
    parts = [torch.zeros(300, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    half = normal(3, 1, 300)
    targets = torch.cat([half, -half], dim=2)
    ours = gradient_affinity(quadratic(targets, parts), parts, 3, 1, width=256)
    assert (ours - cosine(targets[:, 0])).abs().max() < 0.3


def test_a_gradient_that_fits_is_kept_as_it_is() -> None:
    theta = torch.zeros(64, dtype=torch.float64, requires_grad=True)
    targets = normal(4, 1, 64)
    ours = gradient_affinity(quadratic(targets, [theta]), [theta], 4, 1, width=64)
    assert_near(ours, cosine(targets[:, 0]), FLOAT64)


@pytest.mark.parametrize(("value", "named"), [(0.0, "0"), (float("nan"), "nan")])
def test_no_gradient_no_affinity(value: float, named: str) -> None:
    theta = torch.zeros(3, requires_grad=True)
    with pytest.raises(InputError, match=rf"time 1 of 2 is {named}: train the network"):
        gradient_affinity(lambda k, _: (theta * (value if k else 1.0)).sum(), [theta], 2, 1)
