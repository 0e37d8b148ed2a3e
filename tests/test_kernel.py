"""Kernel distance: brute force, no bias, and no dependence on order or pieces."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stratagem.errors import InputError
from stratagem.metrics.kernel import Kid, kid
from stratagem.randomness import normal, permutation
from tolerances import FLOAT64


def _brute(a: np.ndarray, b: np.ndarray) -> float:
    """The definition, pair by pair."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(np.dot(x, y)) / len(x) + 1) ** 3

    within = sum(
        np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
        for x in (a, b)
    )
    return float(within - 2 * np.mean([kernel(x, y) for x in a for y in b]))


@pytest.mark.parametrize("chunk", [1, 5, 4096])
def test_kid_is_its_definition(chunk: int) -> None:
    a, b = normal((31, 6), 0, "test") + 1, 1.3 * normal((17, 6), 1, "test")
    expected = _brute(a.double().numpy(), b.double().numpy())
    assert kid(a, b, chunk=chunk).value == pytest.approx(expected, rel=FLOAT64)
    assert kid(b, a).value == pytest.approx(expected, rel=FLOAT64)


def test_kid_is_symmetric() -> None:
    a, b = normal((50, 6), 0, "test") + 1, 1.3 * normal((60, 6), 1, "test")
    assert kid(b, a) == pytest.approx(kid(a, b), rel=FLOAT64)


def test_kid_does_not_depend_on_order() -> None:
    a, b = normal((300, 8), 0, "test"), normal((200, 8), 1, "test") + 0.2
    shuffled = (x[permutation(len(x), 2, "test")] for x in (a, b))
    assert kid(*shuffled).value == pytest.approx(kid(a, b).value, rel=FLOAT64)


def test_kid_is_unbiased_and_its_error_is_its_scatter() -> None:
    """Over draws of few images of one source the mean is 0, and the biased estimate is not."""
    draws = [kid(normal((60, 4), n, "a"), normal((60, 4), n, "b")) for n in range(200)]
    values = torch.tensor([d.value for d in draws])
    scatter = float(values.std())
    assert abs(float(values.mean())) < 4 * scatter / math.sqrt(len(draws))
    assert (values < 0).float().mean() > 0.3
    # of one source the error of blocks is too large, never too small
    assert float(torch.tensor([d.error for d in draws]).mean()) > scatter


def test_error_of_different_sources_is_the_scatter() -> None:
    draws = [kid(normal((400, 4), n, "a"), normal((400, 4), n, "b") + 1) for n in range(150)]
    scatter = float(torch.tensor([d.value for d in draws]).std())
    error = float(torch.tensor([d.error for d in draws]).mean())
    assert error == pytest.approx(scatter, rel=0.2)


def test_sorted_images_do_not_change_the_error() -> None:
    a, b = normal((400, 4), 0, "test"), normal((400, 4), 1, "test") + 1
    in_order = (x[x[:, 0].argsort()] for x in (a, b))
    assert kid(*in_order).error == pytest.approx(kid(a, b).error, rel=0.7)


def test_kid_grows_with_distance() -> None:
    a = normal((200, 4), 0, "test")
    found = [kid(a, normal((200, 4), 1, "test") + d).value for d in (0.0, 0.5, 1.0, 2.0)]
    assert found == sorted(found)
    assert found[1] > 10 * abs(found[0])


def test_few_images() -> None:
    few = normal((19, 3), 0, "test")
    found = kid(few, few + 1)
    assert isinstance(found, Kid)
    assert math.isnan(found.error)
    assert not math.isnan(kid(normal((20, 3), 0, "test"), normal((20, 3), 1, "test")).error)
    with pytest.raises(InputError, match="at least 2"):
        kid(few[:1], few)
