"""What the tests of the solvers share: golden files of trajectories, and a way to watch one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from oracles import GaussianOracle
from stratagem.denoiser import Predictor
from stratagem.randomness import normal_rows
from stratagem.sampler import Sampler, sample
from stratagem.schedule import NoiseSchedule


class Golden:
    """One golden file: its tensors in float64 and the settings of its cases."""

    def __init__(self, name: str) -> None:
        with safe_open(Path(__file__).parent / "golden" / f"{name}.safetensors", "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.tensors = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118
        self.cases: dict[str, dict[str, Any]] = self.config["cases"]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def oracle(self, schedule: NoiseSchedule) -> GaussianOracle:
        return GaussianOracle(schedule, self["inputs/mu"], self.config["field"]["s"])


def noise(num: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, shape (num, 2, 3, 3)."""
    return normal_rows(range(num), (2, 3, 3), "test").to(dtype)


def states(predictor: Predictor, solver: Sampler, x_T: Tensor, times: Tensor) -> Tensor:
    """Samples, and returns the state at every time, shape (len(times), B, *)."""
    seen: list[Tensor] = []
    sample(predictor, solver, x_T, times, callback=lambda *state: seen.append(state[2]))
    return torch.stack(seen)


def measured_order(steps: list[int], errors: list[float]) -> float:
    """The slope of log error over log step size, by least squares."""
    log_steps = torch.tensor(steps, dtype=torch.float64).log()
    design = torch.stack([log_steps, torch.ones_like(log_steps)], 1)
    logs = torch.tensor(errors, dtype=torch.float64).log()
    return -torch.linalg.lstsq(design, logs[:, None]).solution[0].item()
