"""Moving averages of the weights: the network that is sampled.

    ema <- ema + (1 - beta_t) (weights - ema)          after optimizer step t = 1, 2, ...

    exponential     beta_t = min(decay, (1 + t) / (10 + t)); the warm-up lets a short run forget its
                    random start: it reaches back over a tenth of the run, until decay takes over
    power function  beta_t = (1 - 1/t)^(gamma + 1): the average keeps the shape p(tau) ~ tau^gamma
                    on (0, t], however long the run is. It is named by its relative standard
                    deviation, sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))
                    (Karras et al. 2024, arXiv 2312.02696, Eqs. 1 to 3 and Algorithm 2)

Averages that were not tracked are mixed of those that were, at several steps (post hoc, section 3.2
there). With the weights of step tau held over (tau - 1, tau], a tracked average is exactly

    sum_tau weights(tau) integral p over (tau - 1, tau],    p = (gamma + 1) tau^gamma / t^(gamma+1)

so if sum_i c_i p_i is near the wanted p in least squares, the averages are near too. The c sum to 1
and give the wanted mean step: a mixture is exact where the weights move along a line, and elsewhere
wrong by at most |sum_i c_i p_i - p| times the distance of their path from a line.

Averages are kept in float32, where the weights are: on their device, and in shards where they are
sharded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stratagem.distributed import fill

__all__ = ["WIDEST", "Ema", "Mixture", "Profile", "gamma_of", "group_of", "mix", "std_of"]

WIDEST = 12**-0.5
"""Relative standard deviation of the plain mean of all steps, gamma = 0."""


class Ema:
    """Averages the parameters of a module; buffers are taken as they are.

    Args:
        module: The module whose weights are followed.
        decay: beta of the exponential average after its warm-up, in [0, 1).
        stds: Relative standard deviations of the power functions that are tracked beside it.

    Attributes:
        weights: The exponential average by parameter name.
        groups: All averages: "ema" is that one, `group_of(std)` the others.
    """

    def __init__(self, module: nn.Module, decay: float, stds: Sequence[float] = ()) -> None:
        self.decay = decay
        self._source = dict(module.named_parameters())
        self._gammas = {group_of(std): gamma_of(std) for std in stds}
        self.groups = {group: self._copy() for group in ("ema", *self._gammas)}
        self.weights = self.groups["ema"]

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().float().clone() for name, p in self._source.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the averages towards the weights after optimizer step `step`, counted from 1."""
        weights = [p.float() for p in self._source.values()]
        betas = {group: (1 - 1 / step) ** (gamma + 1) for group, gamma in self._gammas.items()}
        betas["ema"] = min(self.decay, (1 + step) / (10 + step))
        for group, beta in betas.items():
            torch._foreach_lerp_(list(self.groups[group].values()), weights, 1 - beta)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Returns the averages by group and parameter name."""
        return {group: dict(averages) for group, averages in self.groups.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes over saved averages; names and shapes must agree (KeyError, ValueError)."""
        for group, averages in self.groups.items():
            for name, average in averages.items():
                fill(average, state[group][name])


def group_of(std: float) -> str:
    """Returns the name under which checkpoints hold a tracked average.

    Example:
        >>> group_of(0.05)
        'ema-0.05'
    """
    return f"ema-{std}"


def std_of(gamma: float) -> float:
    """Returns the relative standard deviation of tau^gamma on (0, t] (arXiv 2312.02696, Eq. 3).

    Example:
        >>> round(std_of(6.94), 3)
        0.1
    """
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


def gamma_of(std: float) -> float:
    """Returns the exponent of a relative standard deviation in (0, WIDEST]; inverts `std_of`.

    With u = gamma + 2 and q = 1 / std^2 it is the largest root of u^3 + u^2 - q u + q.

    Raises:
        ValueError: If there is none.

    Example:
        >>> round(gamma_of(0.10), 2)
        6.94
    """
    if not 0 < std <= WIDEST:
        raise ValueError(f"relative standard deviation {std}: give one in (0, {WIDEST:.3f}]")
    return float(np.roots([1, 1, -(std**-2), std**-2]).real.max()) - 2


class Profile(NamedTuple):
    """A power-function average as it stands after a step.

    Attributes:
        step: Steps that it averages.
        std: Its relative standard deviation.
    """

    step: int
    std: float


class Mixture(NamedTuple):
    """How to mix tracked averages into another one.

    Attributes:
        weights: One per tracked average; they sum to 1.
        error: |sum_i c_i p_i - p| / |p|.
    """

    weights: list[float]
    error: float


def mix(tracked: Sequence[Profile], wanted: Profile) -> Mixture:
    """Finds the mixture of tracked averages that is nearest to the wanted one.

    Least squares of the profiles, with sum and mean step held (arXiv 2312.02696, section 3.2).

    Args:
        tracked: What there is, at least two that differ.
        wanted: What there shall be.

    Example:
        >>> found = mix([Profile(100, 0.05), Profile(100, 0.1)], Profile(100, 0.1))
        >>> [round(c, 6) + 0.0 for c in found.weights], round(found.error, 6)
        ([0.0, 1.0], 0.0)
    """
    every = _products([*tracked, wanted])
    gram, aim = every[:-1, :-1], every[:-1, -1]
    held = np.array([[1.0, _mean_step(p) / wanted.step] for p in tracked]).T
    start = np.linalg.pinv(held) @ [1.0, _mean_step(wanted) / wanted.step]
    free = np.linalg.svd(held)[2][2:]  # changes of the weights that leave sum and mean alone
    rest = np.linalg.pinv(free @ gram @ free.T, rcond=1e-12, hermitian=True)
    found = start + free.T @ rest @ free @ (aim - gram @ start)
    squared = found @ gram @ found - 2 * found @ aim + every[-1, -1]
    return Mixture(found.tolist(), max(0.0, squared / every[-1, -1]) ** 0.5)


def _products(profiles: Sequence[Profile]) -> np.ndarray:
    """Inner products of profiles, times the largest step.

    integral of p_i p_j over (0, m], m = min(t_i, t_j), is, with a = gamma + 1,
    a_i a_j / (a_i + a_j - 1) (m / t_i)^gamma_i (m / t_j)^gamma_j / max(t_i, t_j).
    """
    t = np.array([float(p.step) for p in profiles])
    gamma = np.array([gamma_of(p.std) for p in profiles])
    low, high = np.minimum.outer(t, t), np.maximum.outer(t, t)
    reach = (low / t[:, None]) ** gamma[:, None] * (low / t) ** gamma
    return np.outer(gamma + 1, gamma + 1) / np.add.outer(gamma, gamma + 1) * reach * t.max() / high


def _mean_step(profile: Profile) -> float:
    """The average of 1, 2, ..., t under a profile: t - sum over tau < t of (tau / t)^(gamma+1)."""
    steps = np.arange(profile.step) / profile.step
    return profile.step - float((steps ** (gamma_of(profile.std) + 1)).sum())
