"""Inception Score: its bounds, splits, and sums that may be made in any pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratagem.metrics.inception_score import SPLIT, InceptionScore, class_sums, inception_score
from stratagem.randomness import normal
from tolerances import FLOAT64


def _definition(p: np.ndarray) -> float:
    marginal = p.mean(0)
    return float(np.exp((p * (np.log(p) - np.log(marginal))).sum(1).mean()))


def test_the_score_is_its_definition_by_split() -> None:
    p = (3 * normal((25, 6), 0, "test")).double().softmax(1)
    parts = [_definition(part.numpy()) for part in (p[:13], p[13:])]  # none of 5 alone
    found = inception_score(class_sums(p, 0, 25, split=10))
    assert found.value == pytest.approx(np.mean(parts), rel=FLOAT64)
    assert found.std == pytest.approx(np.std(parts), rel=FLOAT64)
    assert SPLIT == 5000
    whole = inception_score(class_sums(p, 0, 25))
    assert whole == InceptionScore(pytest.approx(_definition(p.numpy()), rel=FLOAT64), 0)


@pytest.mark.parametrize("size", [1, 4, 24])
def test_sums_may_be_made_in_pieces(size: int) -> None:
    p = normal((25, 6), 0, "test").double().softmax(1)
    pieces = [class_sums(part, size * n, 25, split=10) for n, part in enumerate(p.split(size))]
    torch.testing.assert_close(sum(pieces), class_sums(p, 0, 25, split=10), rtol=1e-12, atol=0)


def test_bounds() -> None:
    """From 1, where all samples look alike, to the number of classes."""
    alike = normal((1, 6), 0, "test").softmax(1).expand(12, -1)
    assert inception_score(class_sums(alike, 0, 12)).value == pytest.approx(1, abs=1e-6)
    clear = torch.eye(6).repeat(2, 1)
    assert inception_score(class_sums(clear, 0, 12)).value == pytest.approx(6, rel=FLOAT64)
