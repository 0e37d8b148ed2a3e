"""What a run costs: parameters, and MACs per network call averaged over draws and sampler's calls.

The stages differ in cost, and neither training nor a sampler meets them equally often. Training's
shares are those that its batches are drawn with; the sampler's calls are counted: its own loop is
run once on a stand-in that only notes the times it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stratagem.assemble import Model, make_density, make_schedule
from stratagem.clustering.search import share_of_draws
from stratagem.config import RunConfig
from stratagem.denoiser import Prediction
from stratagem.nets.cost import macs, mean_macs, parameters
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.programs.sample import SampleConfig, make_solver
from stratagem.sampler import sample
from stratagem.schedule import NoiseSchedule
from stratagem.stages import Stages

__all__ = ["Cost", "Visits", "blank_images", "call_times", "cost_of", "network_cost", "visits"]


class Visits(NamedTuple):
    """How often each stage is met.

    Attributes:
        draws: Share of the training draws; sum 1.
        calls: Network calls for one image.
    """

    draws: tuple[float, ...]
    calls: tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """Of one network; lists have an entry per stage.

    Attributes:
        parameters: All of them.
        calls: Network calls in each stage, for one image.
        stage_macs: MACs of one call in each stage.
        mean_macs: MACs of a call, mean over the sampler's calls.
        stage_parameters: Parameters that a call in each stage uses.
        draws: Share of the training draws in each stage.
        mean_macs_draws: MACs of a call, mean over the training draws.
    """

    parameters: int
    calls: tuple[int, ...]
    stage_macs: tuple[int, ...]
    mean_macs: float
    stage_parameters: tuple[int, ...]
    draws: tuple[float, ...]
    mean_macs_draws: float


def cost_of(model: Model, cfg: SampleConfig) -> Cost:
    """Counts what a trained run costs when it samples like this."""
    met = visits(model.config, model.denoiser.stages, cfg)
    return network_cost(model.denoiser.backbone, blank_images(model.made), met)


def visits(run: RunConfig, stages: Stages | None, cfg: SampleConfig) -> Visits:
    """Counts how often training and sampling meet each stage.

    Shares that follow the measured loss (stages.policy loss) are not known beforehand: they start
    as the density's, which is what is returned.
    """
    stages, schedule = stages or Stages(()), make_schedule(run.diffusion.schedule)
    index = stages.index(schedule.log_snr(torch.tensor(call_times(cfg, schedule))))
    calls = tuple(int((index == k).sum()) for k in range(stages.num))
    draws = share_of_draws(stages, make_density(run.diffusion, schedule), schedule)
    if run.stages is not None and run.stages.policy == "uniform":
        draws = (1 / stages.num,) * stages.num
    return Visits(draws, calls)


def blank_images(made: Mapping[str, Any], num: int = 1) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns what a backbone is called with, for some images: x_t, time and condition.

    Args:
        made: What the run is made from, `assemble.Parts.description`.
        num: How many images.
    """
    condition: dict[str, Tensor] = {}
    if made["memory_dim"]:
        condition["memory"] = torch.zeros(num, made["memory_dim"])
    if made["num_classes"]:
        condition["label"] = torch.zeros(num, dtype=torch.int64)
    return torch.zeros(num, *made["shape"]), torch.zeros(num), condition


def network_cost(
    backbone: nn.Module, image: tuple[Tensor, Tensor, dict[str, Tensor]], met: Visits
) -> Cost:
    """Counts what a network costs whose stages are met so often; see `blank_images`."""
    assert isinstance(backbone, MultiDecoder)
    x_t, t, condition = image
    stages = range(len(met.draws))
    per_stage = [macs(backbone, x_t, t, stage=k, **condition) for k in stages]
    # One decoder for all stages is there once for each.
    own = [parameters(backbone.decoders[min(k, backbone.num_stages - 1)]) for k in stages]
    return Cost(
        parameters(backbone),
        met.calls,
        tuple(per_stage),
        mean_macs(per_stage, met.calls),
        tuple(parameters(backbone.encoder) + number for number in own),
        met.draws,
        mean_macs(per_stage, met.draws),
    )


def call_times(cfg: SampleConfig, schedule: NoiseSchedule) -> list[float]:
    """Returns the times at which a sampler calls the network, in order."""
    noted = _Noted(schedule)
    solver, times = make_solver(cfg, schedule)
    sample(noted, solver, torch.zeros(1, 1), times, seeds=[0])
    return noted.times


class _Noted:
    """Stands for a denoiser and notes the times it is asked for."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self.times: list[float] = []

    def __call__(self, x_t: Tensor, t: Tensor, **_: Tensor) -> Prediction:
        self.times.append(float(t))
        return Prediction(torch.zeros_like(x_t), x_t)
