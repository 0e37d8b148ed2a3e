"""What is kept of the features of a set of images, in one pass over them.

    pooled     mean and covariance           Frechet distance
    spatial    the same of spatial ones      sFID
    rows       the features themselves       KID, precision and recall, bootstrap
    classes    sums of class probabilities   Inception Score

All but the rows take memory that does not grow with the number of images. Each is a monoid: parts
made by several processes, of disjoint images, are joined, and neither batches nor the number of
processes changes the result but for the rounding of float64 sums.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from stratagem.distributed import World
from stratagem.errors import InputError
from stratagem.metrics.features import FeatureNet
from stratagem.metrics.frechet import Statistics, joined, merge, moments
from stratagem.metrics.inception import Inception
from stratagem.metrics.inception_score import class_sums
from stratagem.nets.inception import Outputs

__all__ = ["Summary", "Wanted", "summarise"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Wanted:
    """What to keep besides the pooled statistics; `spatial` and `classes` only of Inception."""

    rows: bool = False
    spatial: bool = False
    classes: bool = False


@dataclass(frozen=True)
class Summary:
    """What is kept of a set of images; what was not wanted is None.

    Attributes:
        pooled: Statistics of the features.
        spatial: Statistics of the spatial features of sFID.
        rows: The features in order, shape (N, D), float32.
        classes: See `metrics.inception_score`.
    """

    pooled: Statistics
    spatial: Statistics | None = None
    rows: Tensor | None = None
    classes: Tensor | None = None

    def join(self, other: Summary) -> Summary:
        """Returns the summary of both sets; the other's images come after this one's."""
        return Summary(
            merge(self.pooled, other.pooled),
            _both(merge, self.spatial, other.spatial),
            _both(lambda a, b: torch.cat([a, b]), self.rows, other.rows),
            _both(torch.add, self.classes, other.classes),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Returns what is kept of real images as tensors, to be stored."""
        found = {"num": torch.tensor(self.pooled.num), "rows": self.rows}
        found |= {"mean": self.pooled.mean, "cov": self.pooled.cov}
        if self.spatial is not None:
            found |= {"spatial_mean": self.spatial.mean, "spatial_cov": self.spatial.cov}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, found: Mapping[str, Tensor]) -> Summary:
        """Returns the summary that `tensors` was made of."""
        num = int(found["num"])
        spatial = None
        if "spatial_mean" in found:
            spatial = Statistics(found["spatial_mean"], found["spatial_cov"], num)
        return cls(Statistics(found["mean"], found["cov"], num), spatial, found.get("rows"))


def summarise(
    batches: Iterable[Tensor],
    net: FeatureNet,
    wanted: Wanted = Wanted(),
    *,
    first: int = 0,
    num: int = 0,
    world: World = World(),  # noqa: B008
) -> Summary:
    """Returns what is wanted of a stream of uint8 images, (B, C, H, W) each, on the CPU.

    Under several processes each gives its share, in the order of their ranks, and all get the
    summary of all images.

    Args:
        batches: The images of this process.
        net: What makes features.
        wanted: What to keep.
        first: Number of this process's first image.
        num: How many images there are in all, for the splits of the Inception Score.
        world: The processes.

    Raises:
        InputError: If there are no images, or a feature is not finite.
    """
    with world.together():
        share = _share(batches, net, wanted, first, num)
    found = [part for part in world.gather(share) if part is not None]
    if not found:
        raise InputError("there are no images to take statistics of")
    return functools.reduce(Summary.join, found)


@torch.no_grad()
def _share(
    batches: Iterable[Tensor], net: FeatureNet, wanted: Wanted, first: int, num: int
) -> Summary | None:
    pooled: Statistics | None = None
    spatial: Statistics | None = None
    classes: Tensor | None = None
    rows = list[Tensor]()
    for images in batches:
        seen = _look(net, images, wanted)
        pooled = joined(pooled, moments(seen.pooled))
        if wanted.rows:
            rows.append(seen.pooled.float().cpu())
        if wanted.spatial:
            assert seen.spatial is not None, net.name
            spatial = joined(spatial, moments(seen.spatial))
        if wanted.classes:
            assert seen.classes is not None, net.name
            sums = class_sums(seen.classes, first, num).cpu()
            classes = sums if classes is None else classes + sums
        first += len(images)
    if pooled is None:
        return None
    kept = torch.cat(rows) if rows else None
    return Summary(_on_cpu(pooled), spatial and _on_cpu(spatial), kept, classes)


def _look(net: FeatureNet, images: Tensor, wanted: Wanted) -> Outputs:
    if isinstance(net, Inception):
        return net.outputs(images, wanted.classes)
    return Outputs(net(images))


def _on_cpu(found: Statistics) -> Statistics:
    return dataclasses.replace(found, mean=found.mean.cpu(), cov=found.cov.cpu())


def _both(join: Callable[[_T, _T], _T], a: _T | None, b: _T | None) -> _T | None:
    return None if a is None or b is None else join(a, b)
