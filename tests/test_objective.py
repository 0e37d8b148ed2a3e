"""Losses: zero at the truth, the closed form otherwise, one per example, equal to the original."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stratagem.denoiser import Denoiser, Parameterization
from stratagem.errors import InputError
from stratagem.nets.cost import parameters
from stratagem.objective import AlignmentHead, Losses, Objective
from stratagem.schedule import EDM, VP, Cosine, Linear, NoiseSchedule, expand
from stratagem.stages import Stages
from tolerances import FLOAT32, assert_near

GOLDEN = Path(__file__).parent / "golden" / "transport_losses.safetensors"
SCHEDULES: dict[str, NoiseSchedule] = {"Linear": Linear(), "GVP": Cosine(), "VP": VP()}


class Fixed(nn.Module):
    """A backbone whose output is given."""

    def __init__(self, output: Tensor, tokens: Tensor | None = None) -> None:
        super().__init__()
        self.output = output
        self.tokens = tokens
        self.block = nn.Identity()

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        self.block(self.tokens)
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


def test_edm_weight_is_finite_at_both_ends() -> None:
    """The weight is 1 / sigma_data^2 where alpha is 0; where sigma is, there is no error."""
    x, eps = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    objective = Objective(Denoiser(Fixed(torch.zeros_like(x)), Linear(), "edm"))
    losses = objective(x, eps, torch.tensor([0.0, 1.0]))
    assert losses.denoise[0] == 0
    assert_near(losses.denoise[1], (x[1] / 0.5).square().mean(), FLOAT32)


def test_an_angle_nobody_wants_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stratagem.objective.cosine_similarity", None)
    x, eps, t = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([0.2, 0.7])
    for parameterization in get_args(Parameterization):
        denoiser = Denoiser(Fixed(x), Linear(), parameterization)
        assert Objective(denoiser)(x, eps, t).denoise.isfinite().all()


# --- alignment -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCHEDULES)
def test_gmem_total_equals_the_original(path: str) -> None:
    golden = load_file(GOLDEN)
    schedule, t = SCHEDULES[path], 1 - golden["inputs/t"]
    x, eps, output = (golden[f"inputs/{k}"] for k in ("x1", "x0", "model_output"))
    denoiser = Denoiser(Fixed(-output, golden["inputs/z_tilde"]), schedule, "v")
    objective = Objective(denoiser, cosine=True, head=nn.Identity(), tap="block")
    losses = objective(x, eps, t, align=golden["inputs/z"])
    assert losses.align is not None
    assert losses.align.shape == (4,)
    assert losses.cosine is not None
    assert_near(losses.align.mean()[None], golden[f"outputs/{path}/velocity/proj_loss"], FLOAT32)
    total = losses.denoise.mean() + losses.cosine.mean() + 0.5 * losses.align.mean()
    assert_near(total[None], golden[f"outputs/{path}/velocity/gmem_total_w0.5"], FLOAT32)


def test_alignment_sees_directions_only_and_each_example_alone() -> None:
    tokens = torch.randn(3, 4, 6)
    objective = Objective(
        Denoiser(Fixed(torch.zeros(3, 2, 4, 4), tokens), Linear(), "v"),
        head=nn.Identity(),
        tap="block",
    )
    x, t = torch.zeros(3, 2, 4, 4), torch.full((3,), 0.5)
    half = torch.cat((tokens[2, :2], -tokens[2, 2:]))  # two tokens agree, two are opposite
    target = torch.cat((7 * tokens[:1], -7 * tokens[1:2], half[None]))
    losses = objective(x, x, t, align=target)
    assert losses.align is not None
    assert_near(losses.align, torch.tensor([-1.0, 1.0, 0.0]), FLOAT32)


def test_head_and_network_learn_from_alignment_and_no_hook_stays() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(
        nn.Flatten(2), nn.Linear(16, 6), nn.Linear(6, 16), nn.Unflatten(2, (4, 4))
    )

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
            return self.inner(x_t)

    head = AlignmentHead(6, 5, hidden=8)
    objective = Objective(Denoiser(Backbone(), Linear(), "v"), head=head, tap="inner.1")
    x, t = torch.randn(3, 2, 4, 4), torch.full((3,), 0.5)
    losses = copy.deepcopy(objective)(x, x, t, align=torch.randn(3, 2, 5))
    assert all(p.grad is None for p in objective.parameters())
    losses = objective(x, x, t, align=torch.randn(3, 2, 5))
    losses.align.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())
    assert inner[1].weight.grad.any()  # type: ignore[union-attr]
    assert inner[2].weight.grad is None  # after the tap
    assert not inner[1]._forward_hooks
    names = [name for name, _ in objective.named_parameters()]
    assert len(names) == len(set(names)) == 10


def test_alignment_head_is_the_published_one() -> None:
    with torch.device("meta"):
        assert parameters(AlignmentHead(1152, 768)) == 8_131_328
        assert parameters(AlignmentHead(768, 768)) == 137_722_912 - 130_378_016
    head = AlignmentHead(6, 5, hidden=7)
    h = torch.randn(2, 3, 6)
    first, second, last = (m for m in head.layers if isinstance(m, nn.Linear))
    hidden = first(h) * first(h).sigmoid()
    hidden = second(hidden) * second(hidden).sigmoid()
    assert_near(head(h), last(hidden), FLOAT32)
    assert not any(m.bias.any() for m in (first, second, last))


def test_alignment_without_a_partner_is_refused() -> None:
    x, t, tokens = torch.zeros(3, 2, 4, 4), torch.full((3,), 0.5), torch.randn(3, 4, 6)
    denoiser = Denoiser(Fixed(x, tokens), Linear(), "v")
    with pytest.raises(ValueError, match="both head and tap"):
        Objective(denoiser, head=nn.Identity())
    with pytest.raises(InputError, match=r"alignment taps 'blocks.7', but"):
        Objective(denoiser, head=nn.Identity(), tap="blocks.7")
    with pytest.raises(ValueError, match="a head with align="):
        Objective(denoiser)(x, x, t, align=tokens)
    objective = Objective(denoiser, head=nn.Identity(), tap="block")
    with pytest.raises(ValueError, match="a head with align="):
        objective(x, x, t)
    with pytest.raises(ValueError, match=r"align is \(3, 4, 5\), but the head gives \(3, 4, 6\)"):
        objective(x, x, t, align=tokens[..., :5])


class Told(nn.Module):
    """A backbone that notes what it is told of stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[object] = []

    def forward(self, x_t: Tensor, time: Tensor, stage: object = None) -> Tensor:
        self.stages.append(stage)
        return x_t


def test_the_stage_of_a_batch_reaches_the_network_and_is_found_from_t_without() -> None:
    x, t, net = torch.randn(3, 1, 2, 2), torch.tensor([0.1, 0.5, 0.9]), Told()
    objective = Objective(Denoiser(net, Linear(), "v", Stages((1.0, -1.0))))
    for stage in ((1, 1, 1), 2, None):
        objective(x, x, t, stage=stage)
    assert net.stages[:2] == [(1, 1, 1), 2]
    assert isinstance(net.stages[2], Tensor)
    assert net.stages[2].tolist() == [0, 1, 2]
    Objective(Denoiser(net, Linear(), "v"))(x, x, t)
    assert net.stages[3] is None
