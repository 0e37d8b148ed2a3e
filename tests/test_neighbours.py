"""Precision, recall, density, coverage: another program's values, and laws."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from stratagem.errors import InputError
from stratagem.metrics.neighbours import Neighbours, neighbour_scores
from stratagem.randomness import normal, permutation


def _sets(num_real: int = 230, num_fake: int = 170) -> tuple[Tensor, Tensor]:
    real = normal((num_real, 5), 0, "real") + 30
    return real, 0.8 * normal((num_fake, 5), 1, "fake") + 30.4


@pytest.mark.parametrize("k", [1, 3, 5])
def test_values_are_those_of_the_prdc_package(k: int) -> None:
    prdc = pytest.importorskip("prdc")
    real, fake = _sets()
    expected = prdc.compute_prdc(real.double().numpy(), fake.double().numpy(), k)
    found = neighbour_scores(real, fake, k)._asdict()
    assert found == pytest.approx({name: float(expected[name]) for name in found}, abs=1e-12)
    assert 0.1 < found["recall"] < 0.99


@pytest.mark.parametrize("chunk", [7, 169, 4096])
def test_neither_pieces_nor_order_matter(chunk: int) -> None:
    real, fake = _sets()
    shuffled = (x[permutation(len(x), 2, "test")] for x in (real, fake))
    assert neighbour_scores(*shuffled, chunk=chunk) == neighbour_scores(real, fake)


def test_a_set_is_its_own_neighbour() -> None:
    real, _ = _sets()
    assert neighbour_scores(real, real) == Neighbours(1, 1, 1, 1)
    assert neighbour_scores(real, real.flip(0)) == Neighbours(1, 1, 1, 1)


def test_far_sets_share_nothing() -> None:
    real, fake = _sets()
    assert neighbour_scores(real, fake + 100) == Neighbours(0, 0, 0, 0)


def test_figures_fall_as_samples_move_away() -> None:
    real, fake = _sets()
    found = [neighbour_scores(real, fake + d) for d in (0.0, 1.0, 2.0, 4.0)]
    for nearer, farther in pairwise(found):
        assert all(a > b for a, b in zip(nearer, farther, strict=True))


def test_a_collapsed_sampler_is_precise_and_covers_little() -> None:
    real, _ = _sets()
    one = real[:1] + 1e-3 * normal((100, 5), 3, "test")
    found = neighbour_scores(real, one)
    assert found.precision == 1
    assert found.recall <= 0.02
    assert found.coverage < 0.2


def test_an_outlier_fools_precision_and_not_density() -> None:
    """Its ball holds all samples between it and the rest."""
    real, _ = _sets()
    outlier = torch.cat([real, real.mean(0, keepdim=True) + 40])
    between = real.mean(0) + 20 + 0.01 * normal((50, 5), 4, "test")
    found = neighbour_scores(outlier, between)
    assert found.precision == 1
    assert found.density == pytest.approx(1 / 5)
    assert found.coverage == pytest.approx(1 / len(outlier))


def test_impossible_neighbours_are_refused() -> None:
    real, fake = _sets(9, 6)
    assert all(map(math.isfinite, neighbour_scores(real, fake, 5)))
    for k in (0, 6):
        with pytest.raises(InputError, match=f"{k} neighbours of 6 images"):
            neighbour_scores(real, fake, k)
