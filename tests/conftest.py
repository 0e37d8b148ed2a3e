"""Shared set-up: one thread, so that suites side by side do not spin against each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stratagem.data.shards import DataSet
from stratagem.data.writing import Sample, Source, write_dataset

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """A tiny data set of two classes, 40 images of 1 x 8 x 8, 8 of them held out."""
    path = tmp_path_factory.mktemp("blobs") / "data"
    rows = torch.arange(8).float()
    samples = []
    for k in range(40):
        bright = torch.exp(-((rows - k % 8) ** 2) / 4)
        image = bright[:, None] * torch.exp(-((rows - (k // 8)) ** 2) / 4)[None, :]
        pixels = (255 * image[None]).round().to(torch.uint8)
        samples.append(Sample(pixels, k % 2, f"{k:02d}"))
    source = Source("blobs", ["even", "odd"], samples)
    return write_dataset(path, source, flip=True, holdout=0.2)


@pytest.fixture(scope="session")
def blobs_path(blobs: DataSet) -> Path:
    return blobs.path
