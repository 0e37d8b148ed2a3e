"""DPM-Solver and DPM-Solver++: exponential integrators in half the log-SNR.

    lambda = log(alpha / sigma),   h = lambda_s - lambda_t

The linear part of the probability-flow ODE is solved exactly; m, what the network predicts, is
expanded in powers of lambda. One formula serves both (Lu et al. 2022, arXiv:2206.00927 and
arXiv:2211.01095):

                       m     own     other   z
    DPM-Solver         eps   alpha   sigma   h
    DPM-Solver++       x     sigma   alpha   -h

    x_s = own_s / own_t x_t - other_s (b1 m + b2 h m' + b3 h^2 m'')
    b1 = e^z - 1,  b2 = b1 / z - 1,  b3 = b2 / z - 1/2

The first two terms are DDIM for either. The second-order solvers take b1 / 2, which is b2 up to a
higher order. m' and m'' are differences: of earlier steps (multistep, one call a step), or of calls
between t and s (singlestep, as many calls a step as its order).

A step where h is infinite (from alpha_t = 0, to sigma_s = 0) is DDIM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stratagem.errors import InputError
from stratagem.sampler.base import Predict, Sampler
from stratagem.schedule import NoiseSchedule

__all__ = ["DPMMultistep", "DPMSinglestep", "singlestep_orders"]

Predicts = Literal["x", "eps"]

_FEW_STEPS = 10  # below these, the last steps of a multistep solver are of lower order


class _Node(NamedTuple):
    """What the network said, and at which lambda."""

    m: Tensor
    at: Tensor


class _Past(NamedTuple):
    """What a multistep solver remembers: how many steps were made, and the newest nodes first."""

    steps: int
    nodes: tuple[_Node, ...]


class DPMMultistep(Sampler):
    """The multistep solvers, such as DPM-Solver++(2M); Algorithm 2 of arXiv:2211.01095.

    The first steps are of the order that what is known allows.

    Args:
        order: 1, 2 or 3.
        predicts: "x" is DPM-Solver++, "eps" DPM-Solver.
        num_steps: If it is below 10, the order falls again towards the last step, which is then of
            first order (the official lower_order_final). None: it never falls.
        halved: Of order 3 only: b3 h^2 m'' / 2 as in the official code, which makes its third
            order a second one. For parity.

    Raises:
        InputError: If the order is unknown, or `halved` has no effect.
    """

    def __init__(
        self,
        order: int = 2,
        predicts: Predicts = "x",
        *,
        num_steps: int | None = None,
        halved: bool = False,
    ) -> None:
        if halved and order != 3:
            raise InputError(f"DPM-Solver: halved has no effect on order {order}: leave it out")
        self.order, self.predicts, self.halved = _checked(order), predicts, halved
        few = num_steps is not None and num_steps < _FEW_STEPS
        self._falls_to = num_steps if few else None

    def step(
        self,
        predict: Predict,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        schedule: NoiseSchedule,
        state: _Past | None,
        *_: Any,
    ) -> tuple[Tensor, _Past]:
        """Goes from t to s; see `Sampler.step`."""
        past = state or _Past(0, ())
        prediction, here = predict(x_t, t), _half_log_snr(schedule, t)
        h = _half_log_snr(schedule, s) - here
        nodes = (_Node(getattr(prediction, self.predicts), here), *past.nodes)[: self.order]
        left = self.order if self._falls_to is None else self._falls_to - past.steps
        x_s = schedule.perturb(*prediction, s)
        if torch.isfinite(h):
            x_s = x_s + self._correction(nodes[: max(1, left)], h, s, schedule)
        return x_s, _Past(past.steps + 1, nodes)

    def _correction(
        self, nodes: tuple[_Node, ...], h: Tensor, s: Tensor, schedule: NoiseSchedule
    ) -> Tensor | int:
        """Returns the terms beyond DDIM, of the order that the nodes allow."""
        if len(nodes) == 1:
            return 0
        b1, b2, b3 = _gains(self.predicts, schedule, s, h)
        # A first step from alpha = 0 left a node at lambda = -inf, whose difference then weighs 0.
        r_0 = (nodes[0].at - nodes[1].at) / h
        slope = (nodes[0].m - nodes[1].m) / r_0
        if len(nodes) == 2:
            return b1 / 2 * slope
        r_1 = (nodes[1].at - nodes[2].at) / h
        half_curve = (slope - (nodes[1].m - nodes[2].m) / r_1) / (r_0 + r_1)  # h^2 m'' / 2
        return b2 * (slope + r_0 * half_curve) + (b3 if self.halved else 2 * b3) * half_curve


class DPMSinglestep(Sampler):
    """The singlestep solvers, such as DPM-Solver-3; Algorithms 1 and 2 of arXiv:2206.00927.

    A step of order k makes k calls, the later ones at times between t and s:

        order 2   x_s = DDIM - other_s b1 / 2 (m_1 - m) / r_1
        order 3   x_2 = DDIM - other_2 b2(r_2 h) (r_2 / r_1) (m_1 - m)
                  x_s = DDIM - other_s b2 (m_2 - m) / r_2

    where r_i = (lambda_i - lambda_t) / h.

    Args:
        orders: The order of each step, 1 to 3; see `singlestep_orders`.
        predicts: "x" is DPM-Solver++, "eps" DPM-Solver.
        between: Whether the calls of a step are spread evenly in "log_snr" or in "time".

    Raises:
        InputError: If an order is unknown, or the grid has more steps than there are orders.
    """

    def __init__(
        self,
        orders: Sequence[int],
        predicts: Predicts = "eps",
        between: Literal["log_snr", "time"] = "log_snr",
    ) -> None:
        self.orders = [_checked(order) for order in orders]
        self.order = max(self.orders)
        self.predicts, self.between = predicts, between

    def step(
        self,
        predict: Predict,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        schedule: NoiseSchedule,
        state: int | None,
        *_: Any,
    ) -> tuple[Tensor, int]:
        """Goes from t to s; see `Sampler.step`."""
        number = state or 0
        if number >= len(self.orders):
            raise InputError(f"singlestep solver: the grid has more than {number} steps")
        order, start = self.orders[number], predict(x_t, t)
        here = _half_log_snr(schedule, t)
        h = _half_log_snr(schedule, s) - here
        x_s = schedule.perturb(*start, s)
        if order == 1 or not torch.isfinite(h):
            return x_s, number + 1
        slope: Tensor | float = 0.0  # dm / dlambda
        for u in self._times_between(t, s, order, schedule):
            h_u = _half_log_snr(schedule, u) - here
            x_u = schedule.perturb(*start, u)
            x_u = x_u + _gains(self.predicts, schedule, u, h_u)[1] * h_u * slope
            there = getattr(predict(x_u, u), self.predicts)
            slope = (there - getattr(start, self.predicts)) / h_u
        b1, b2, _b3 = _gains(self.predicts, schedule, s, h)
        return x_s + (b1 / 2 if order == 2 else b2) * h * slope, number + 1

    def _times_between(
        self, t: Tensor, s: Tensor, order: int, schedule: NoiseSchedule
    ) -> list[Tensor]:
        shares = [i / order for i in range(1, order)]
        if self.between == "time":
            return [torch.lerp(t, s, share) for share in shares]
        ends = schedule.log_snr(t), schedule.log_snr(s)
        return [schedule.time_of(torch.lerp(*ends, share)) for share in shares]


def singlestep_orders(num_calls: int, order: int) -> list[int]:
    """Returns the orders of singlestep steps that make exactly `num_calls` calls of the network.

    Of order 3 there are num_calls // 3 + 1 steps; arXiv:2206.00927, Section 3.4.

    Raises:
        InputError: If the order is unknown, or the calls do not suffice for one step of it.

    Example:
        >>> [singlestep_orders(n, 3) for n in (10, 11, 12)]
        [[3, 3, 3, 1], [3, 3, 3, 2], [3, 3, 3, 2, 1]]
        >>> singlestep_orders(5, 2)
        [2, 2, 1]
    """
    whole, rest = divmod(num_calls, _checked(order))
    orders = [order] * whole + [rest] * (rest > 0)
    if order == 3 and rest == 0:
        orders = [*orders[:-1], 2, 1]
    if num_calls < 1 or max(orders) < order:
        raise InputError(
            f"{num_calls} network calls do not make a singlestep solver of order {order}: "
            f"give at least {4 if order == 3 else order}"
        )
    return orders


def _half_log_snr(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    return schedule.log_snr(t) / 2


def _gains(
    predicts: Predicts, schedule: NoiseSchedule, s: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns -other_s (b1, b2, b3)."""
    z, other = (h, schedule.sigma(s)) if predicts == "eps" else (-h, schedule.alpha(s))
    b1 = torch.expm1(z)
    b2 = b1 / z - 1
    return -other * b1, -other * b2, -other * (b2 / z - 0.5)


def _checked(order: int) -> int:
    if order not in (1, 2, 3):
        raise InputError(f"DPM-Solver: order {order} is unknown: choose 1, 2 or 3")
    return order
