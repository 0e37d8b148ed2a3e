"""Losses: zero at the truth, the closed form otherwise, one per example, equal to the original."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stratagem.denoiser import Denoiser
from stratagem.objective import Losses, Objective
from stratagem.schedule import EDM, VP, Cosine, Linear, NoiseSchedule, expand
from tolerances import FLOAT32, assert_near

GOLDEN = Path(__file__).parent / "golden" / "transport_losses.safetensors"
SCHEDULES: dict[str, NoiseSchedule] = {"Linear": Linear(), "GVP": Cosine(), "VP": VP()}


class Fixed(nn.Module):
    """A backbone whose output is given."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        return self.output


@pytest.mark.parametrize("path", SCHEDULES)
def test_losses_equal_the_original(path: str) -> None:
    """Their time runs from noise to data, so their velocity is the negative of ours."""
    golden = load_file(GOLDEN)
    schedule, t = SCHEDULES[path], 1 - golden["inputs/t"]
    x, eps, output = (golden[f"inputs/{k}"] for k in ("x1", "x0", "model_output"))
    losses = Objective(Denoiser(Fixed(-output), schedule, "v"), cosine=True)(x, eps, t)
    assert_near(losses.denoise, golden[f"outputs/{path}/velocity/loss"], FLOAT32)
    assert losses.cosine is not None
    assert_near(losses.cosine, golden[f"outputs/{path}/velocity/cos_loss"], FLOAT32)
    noise = Objective(Denoiser(Fixed(output), schedule, "eps"))(x, eps, t)
    assert_near(noise.denoise, golden[f"outputs/{path}/noise/weight_none/loss"], FLOAT32)
    assert noise.cosine is None


@pytest.mark.parametrize("parameterization", ["v", "eps", "x"])
def test_the_truth_has_no_loss(parameterization: str) -> None:
    x, eps, t = torch.randn(5, 2, 4, 4), torch.randn(5, 2, 4, 4), torch.linspace(0.1, 0.9, 5)
    truth = {"v": Linear().velocity(x, eps, t), "eps": eps, "x": x}[parameterization]
    losses = Objective(Denoiser(Fixed(truth), Linear(), parameterization), cosine=True)(x, eps, t)
    assert isinstance(losses, Losses)
    assert losses.denoise.shape == (5,)
    assert losses.denoise.max() < 1e-9
    off = Objective(Denoiser(Fixed(truth + 0.5), Linear(), parameterization))(x, eps, t)
    torch.testing.assert_close(off.denoise, torch.full((5,), 0.25))


def test_edm_weight_is_that_of_the_paper() -> None:
    """EDM, arXiv 2206.00364, Table 1: weight times c_out^2 is 1, whatever sigma."""
    schedule, t = EDM(), torch.linspace(0.05, 0.95, 7).double()
    x, eps = torch.randn(7, 1, 4, 4).double(), torch.randn(7, 1, 4, 4).double()
    denoiser = Denoiser(Fixed(torch.zeros_like(x)), schedule, "edm")
    sigma = expand(schedule.sigma(t), x)
    target = (x - 0.25 / (sigma**2 + 0.25) * (x + sigma * eps)) / (
        sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    )
    losses = Objective(denoiser)(x, eps, t)
    assert_near(losses.denoise, target.square().flatten(1).mean(1), 1e-6)
