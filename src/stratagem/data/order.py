"""In which order training sees the images, as a pure function of (seed, epoch).

An epoch is N draws. Uniform: each image once. Weighted: image i has the share p_i = w_i / sum w of
the line [0, 1), the shares of a class side by side and its images in random order; draw k falls on

    (k + U) / N,  U uniform in [0, 1)

so that an image is drawn N p_i times in expectation, and each time that or the next whole number;
and so is a class, within one. Then the draws are mixed. Class-balanced draws have w_i = 1 / (images
of the class).

No position needs those before it: an epoch's order is made at once and kept while it lasts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from stratagem import artifact
from stratagem.data.shards import DataSet
from stratagem.errors import InputError
from stratagem.randomness import permutation, uniform

__all__ = ["Sampling", "draw_weights", "epoch_order"]

Sampling = Literal["uniform", "class-balanced", "weighted"]


def epoch_order(data: DataSet, weights: Tensor | None, seed: int, epoch: int) -> Tensor:
    """Returns the training images of an epoch in their order, (number of training images,), int64.

    Args:
        data: The images; held-out ones are never drawn.
        weights: How often to draw each image, relative to the others, (N,); None: each once.
        seed: The run's seed.
        epoch: Which epoch.
    """
    train = data.train_indices
    num = len(train)
    mixed = train[permutation(num, seed, "order", epoch)]
    if weights is None:
        return mixed
    mixed = mixed[data.labels[mixed].argsort(stable=True)]
    ends = weights[mixed].double().cumsum(0)
    places = (torch.arange(num) + uniform((1,), seed, "draws", epoch).double()) / num
    drawn = torch.searchsorted(ends, places * ends[-1], right=True).clamp(max=num - 1)
    return mixed[drawn[permutation(num, seed, "mixing", epoch)]]


def draw_weights(data: DataSet, sampling: Sampling, file: Path | None = None) -> Tensor | None:
    """Returns how often to draw each image, relative to the others, (N,), or None for uniform.

    Args:
        data: The images.
        sampling: How to draw.
        file: Safetensors with "weights" (N,), for weighted.

    Raises:
        InputError: If a training image has no label to balance by, or the weights do not fit.
    """
    labels = data.labels[data.train_indices]
    if sampling == "uniform":
        return None
    if sampling == "class-balanced":
        if not len(data.classes) or int(labels.min()) < 0:
            raise InputError(f"class-balanced draws need a label for each image of {data.path}")
        return labels.bincount(minlength=len(data.classes)).double().reciprocal()[data.labels]
    assert file is not None
    if not file.is_file():
        raise InputError(f"no weights at {file}: the file does not exist")
    weights = artifact.read_tensor_file(file).get("weights")
    if weights is None or tuple(weights.shape) != (data.num,):
        raise InputError(f"{file} does not hold weights ({data.num},), one for each image")
    seen = weights[data.train_indices].double()
    if not (seen.isfinite().all() and (seen >= 0).all() and seen.sum() > 0):
        raise InputError(f"{file}: weights must be finite, none below 0, and not all of them 0")
    return weights
