"""What a run costs: parameters, and MACs per network call averaged over the sampler's calls.

The stages differ in cost, and a sampler does not call them equally often; so the sampler's own loop
is run once on a stand-in that only notes the times it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stratagem.assemble import Model
from stratagem.denoiser import Prediction
from stratagem.nets.cost import macs, mean_macs, parameters
from stratagem.programs.sample import SampleConfig, make_solver
from stratagem.sampler import sample
from stratagem.schedule import NoiseSchedule
from stratagem.stages import Stages

__all__ = ["Cost", "call_times", "cost_of"]


@dataclass(frozen=True)
class Cost:
    """Of one network.

    Attributes:
        parameters: All of them.
        calls: Network calls in each stage, for one image.
        stage_macs: MACs of one call in each stage.
        mean_macs: MACs of a call, mean over the sampler's calls.
    """

    parameters: int
    calls: tuple[int, ...]
    stage_macs: tuple[int, ...]
    mean_macs: float


def cost_of(model: Model, cfg: SampleConfig) -> Cost:
    """Counts what sampling one image costs."""
    denoiser = model.denoiser
    times = torch.tensor(call_times(cfg, denoiser.schedule))
    stages = denoiser.stages or Stages(())
    index = stages.index(denoiser.schedule.log_snr(times))
    calls = [int((index == k).sum()) for k in range(stages.num)]
    x_t, t = torch.zeros(1, *model.shape), torch.zeros(1)
    condition: dict[str, Tensor] = {}
    if model.bank is not None:
        condition["memory"] = torch.zeros(1, model.bank.dim)
    if model.num_classes:
        condition["label"] = torch.zeros(1, dtype=torch.int64)
    per_stage = [macs(denoiser.backbone, x_t, t, stage=k, **condition) for k in range(stages.num)]
    return Cost(
        parameters(denoiser.backbone), tuple(calls), tuple(per_stage), mean_macs(per_stage, calls)
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
