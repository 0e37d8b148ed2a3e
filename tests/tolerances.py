"""Every tolerance of the suite, in one place. None is ever widened to make a test pass."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT64 = 1e-9
FLOAT32 = 1e-5
NETWORK = 2e-5


def assert_near(ours: Tensor, reference: Tensor, bound: float) -> None:
    """Asserts |ours - reference| <= bound (1 + |reference|), elementwise and finite."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    ours, reference = ours.double(), reference.double()
    assert torch.isfinite(ours).all()
    excess = (ours - reference).abs() / (1 + reference.abs())
    assert excess.max() <= bound, f"largest relative difference {excess.max():.3e} > {bound:.0e}"
