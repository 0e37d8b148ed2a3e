"""Averages that a run did not track, mixed of those it did: see `ema` for the mathematics.

    RUN/snapshots/step-*  and a checkpoint  ->  the power-function average of any length, there

Snapshots of a warm start hold one trained decoder and others that never moved. They are parted as
training parted the averages, by copying and scaling; as the weights of a mixture sum to 1, it does
not matter whether it is parted or what it is mixed of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from stratagem.checkpoint import SNAPSHOTS, Checkpoint, list_steps, load
from stratagem.ema import WIDEST, Profile, group_of, mix
from stratagem.errors import InputError
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.nets.warm_start import origins

__all__ = ["average_of"]

_MOST_ERROR = 0.1


def average_of(
    run: Path,
    saved: Checkpoint,
    stds: Sequence[float],
    wanted: float,
    backbone: nn.Module,
    warm_steps: int = 0,
) -> Mapping[str, Tensor]:
    """Returns a power-function average of the weights by parameter name.

    Args:
        run: The run's folder.
        saved: Its checkpoint, at whose step the average is wanted.
        stds: Relative standard deviations that the run tracks.
        wanted: That of the average; a tracked one is returned as it is.
        backbone: The network, for its shape.
        warm_steps: Steps of the run's warm start.

    Raises:
        InputError: If what was tracked does not make that average, or only with an error of its
            profile above 10 %.
        DamagedArtifact: If a snapshot is truncated or altered.
    """
    if wanted in stds:
        return saved.tensors[group_of(wanted)]
    earlier = [step for step in list_steps(run, SNAPSHOTS) if step < saved.step]
    tracked = [Profile(step, std) for step in (*earlier, saved.step) for std in stds]
    if not 0 < wanted <= WIDEST or len(tracked) < 2:
        raise InputError(
            f"--ema-std {wanted}: give a number above 0, at most {WIDEST:.3f}, and a run that has "
            f"two averages to mix; {run} tracks train.ema_stds {list(stds)}"
        )
    weights, error = mix(tracked, Profile(saved.step, wanted))
    if error > _MOST_ERROR:
        raise InputError(
            f"--ema-std {wanted}: {len(earlier)} snapshots of {run} make it with an error of "
            f"{100 * error:.0f} %: choose one nearer to {', '.join(map(str, stds))}, or train with "
            "a smaller train.ema_snapshot_every"
        )
    total = {name: torch.zeros_like(average) for name, average in saved.tensors["ema"].items()}
    for at, step in enumerate((*earlier, saved.step)):
        groups = saved.tensors if step == saved.step else load(run, step, place=SNAPSHOTS).tensors
        for std, weight in zip(stds, weights[at * len(stds) :], strict=False):
            average = dict(groups[group_of(std)])
            if step < warm_steps <= saved.step:
                assert isinstance(backbone, MultiDecoder)
                parted = origins(backbone, backbone.largest).items()
                average |= {name: origin.make(average) for name, origin in parted}
            for name, summed in total.items():
                summed.add_(average[name], alpha=weight)
    return total
