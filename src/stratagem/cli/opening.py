"""Which weights of a run are taken, and with what: the flags of every verb that samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from stratagem.assemble import Model, open_run

__all__ = ["Opened", "Opening"]


@dataclass(frozen=True)
class Opening:
    """How a run is opened.

    Attributes:
        step: Which checkpoint of a run; the newest by default.
        ema_std: Relative standard deviation of the average of the weights, such as 0.07, mixed of
            those that the run tracked (train.ema_stds); the exponential average by default.
        bank: The memory bank of a run, if it has moved or was edited.
        autoencoder: Weights of the autoencoder that made the latents which the run learned from: a
            folder, a file or a hub repository; without, the samples are latents.
    """

    step: int | None = None
    ema_std: float | None = None
    bank: Path | None = None
    autoencoder: str | None = None

    def model(self, run: Path, device: torch.device) -> Model:
        """Opens a run, with its network on a device; see `assemble.open_run`."""
        found = open_run(run, **vars(self))
        found.denoiser.to(device)
        return found


Opened = Annotated[Opening, tyro.conf.arg(name="")]
