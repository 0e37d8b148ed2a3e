"""What samples are compared with: real images, or published statistics of them.

Features of the real images are computed once. If a folder for it is given they are kept there as an
artifact named by all that decides them (feature net, images, what is kept), and found again.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from stratagem import artifact
from stratagem.data.shards import KIND as DATASET
from stratagem.data.shards import DataSet
from stratagem.distributed import World
from stratagem.errors import InputError
from stratagem.metrics.features import FeatureNet, metric_name
from stratagem.metrics.frechet import Interval, bootstrap, frechet_distance, refuse_few
from stratagem.metrics.inception import Inception
from stratagem.metrics.inception_score import SPLIT, inception_score
from stratagem.metrics.kernel import kid
from stratagem.metrics.neighbours import neighbour_scores
from stratagem.metrics.summary import Summary, Wanted, summarise
from stratagem.programs import Progress, part_of, silent
from stratagem.programs.measures import FeatureName, Measures, check, fit_net, load_net
from stratagem.programs.sources import (
    Source,
    holds_images,
    of_dataset,
    open_source,
    read_statistics,
)

__all__ = ["Figures", "Reference", "cache_beside"]

log = logging.getLogger(__name__)
KIND = "statistics"


class Figures(NamedTuple):
    """What was measured.

    Attributes:
        distances: Frechet distances by name.
        others: Every other figure by name.
        intervals: Of Frechet distances by name.
    """

    distances: dict[str, float]
    others: dict[str, float]
    intervals: dict[str, Interval]


class Reference:
    """The real images that samples are compared with, and their statistics, computed once.

    Args:
        path: A data set, samples, a folder of images, an npz of images or of statistics; or the
            images themselves.
        features: Names of the feature nets.
        measures: What is measured, and how.
        world: The processes that share the work, and where this one computes.
        cache: Folder in which features of the real images are kept, if there is one.

    Attributes:
        data: The data set, or None.
        source: Its training images, or whatever images there are; None if only statistics.
        nets: The feature nets.
        summaries: Of the real images, by feature net.
        held_out_distances: Frechet distances of the images held out of training, or None.

    Raises:
        InputError: If there is nothing at `path`, or settings do not fit.
    """

    def __init__(
        self,
        path: Path | Source,
        features: Sequence[FeatureName],
        measures: Measures = Measures(),  # noqa: B008
        *,
        world: World = World(),  # noqa: B008
        cache: Path | None = None,
    ) -> None:
        check(features, measures)
        self.measures, self.world, self._cache = measures, world, cache
        self._stored: Summary | None = None
        self.data: DataSet | None = None
        self.source = self._open(path) if isinstance(path, Path) else path
        self.name = str(path) if isinstance(path, Path) else path.name
        self.nets = [self._net(name) for name in features]
        self.summaries = [self._real(net) for net in self.nets]
        self.held_out_distances = self._held_out_distances()

    @functools.cached_property
    def train(self) -> Tensor:
        """All training images, uint8 (N, C, H, W); of a data set."""
        assert self.data is not None
        return self.data.images(self.data.train_indices)

    @functools.cached_property
    def held_out(self) -> Tensor | None:
        """The held-out images, or None if there are none or they are not asked for."""
        if self.data is None or not self.measures.memorisation:
            return None
        return self.data.images(self.data.held_out_indices) if self.data.held_out.any() else None

    @property
    def num(self) -> int | None:
        """How many real images the distances are to; None if a file of statistics does not say."""
        return None if self._stored or self.source is None else self.source.num

    def require(self, shape: Sequence[int], num: int) -> None:
        """Refuses samples that cannot be measured.

        Raises:
            InputError: If they have another shape (C, H, W), or are too few for the features.
        """
        if self.source is not None and tuple(shape) != self.source.shape:
            raise InputError(
                f"samples of shape {tuple(shape)} cannot be compared with data of shape "
                f"{self.source.shape}: prepare the data at the samples' size"
            )
        if "fd" in self.measures.metrics and not self.measures.allow_few:
            for net in self.nets:
                refuse_few(num, net.dim)

    def measure(self, samples: Source, progress: Progress = silent) -> Figures:
        """Measures samples with every feature net.

        Raises:
            InputError: If there are too few images for a metric.
        """
        found, m = Figures({}, {}, {}), self.measures
        for number, (net, real) in enumerate(zip(self.nets, self.summaries, strict=True)):
            told, wanted = part_of(progress, number, len(self.nets)), self._wanted(net)
            rows, classes = bool(m.bootstrap), "is" in m.metrics and _is_inception(net)
            wanted = Wanted(wanted.rows or rows, wanted.spatial, classes)
            self._measure(found, net, real, self._summary(samples, net, wanted, told))
        return found

    def description(self) -> dict[str, Any]:
        """Returns all that decides the figures, but the samples."""
        m = self.measures
        details: dict[str, Any] = {
            "prdc": {"neighbours": m.neighbours},
            "kid": "unbiased over all pairs, (<x, y> / D + 1)^3, error of disjoint blocks",
            "is": {"split": SPLIT, "bias": False},
            "bootstrap": {"times": m.bootstrap, "seed": 0, "of": "samples", "level": 0.95},
        }
        used = {*m.metrics, "bootstrap"} if m.bootstrap else set(m.metrics)
        return {
            "reference": self._fingerprint(),
            "reference_images": self.num,
            "held_out_images": int(self.data.held_out.sum()) if self.data else 0,
            "features": [net.description() for net in self.nets],
            "held_out_real": self.held_out_distances,
            "metrics": list(m.metrics),
            **{name: detail for name, detail in details.items() if name in used},
        }

    def _measure(self, found: Figures, net: FeatureNet, real: Summary, fake: Summary) -> None:
        m, few = self.measures, self.measures.allow_few
        if "fd" in m.metrics:
            name = metric_name(net)
            found.distances[name] = frechet_distance(fake.pooled, real.pooled, allow_few=few)
            if m.bootstrap:
                assert fake.rows is not None
                rows = fake.rows.to(self.world.device)
                found.intervals[name] = bootstrap(rows, real.pooled, m.bootstrap)
        if fake.spatial is not None and real.spatial is not None:
            spatial = frechet_distance(fake.spatial, real.spatial, allow_few=few)
            found.distances[metric_name(net, "sfd")] = spatial
        others = dict[str, float]()
        if fake.classes is not None:
            score = inception_score(fake.classes)
            others |= {"inception_score": score.value, "inception_score_std": score.std}
        if "kid" in m.metrics:
            distance = kid(*self._rows(fake, real))
            others["kid"] = distance.value
            if not math.isnan(distance.error):
                others["kid_error"] = distance.error
        if "prdc" in m.metrics:
            samples, images = self._rows(fake, real)
            others |= neighbour_scores(images, samples, m.neighbours)._asdict()
        found.others.update({metric_name(net, name): value for name, value in others.items()})

    def _open(self, path: Path) -> Source | None:
        """Opens real images, or statistics, or both."""
        self._stored = read_statistics(path)
        if artifact.kind_of(path) == DATASET:
            self.data = DataSet.open(path)
            return of_dataset(self.data)
        return open_source(path) if self._stored is None or holds_images(path) else None

    def _rows(self, *found: Summary) -> list[Tensor]:
        return [s.rows.to(self.world.device) for s in found if s.rows is not None]

    def _net(self, name: FeatureName) -> FeatureNet:
        device = self.world.device
        if name == "inception":
            return load_net(self.measures, device)
        real = self._images(f"features {name}")
        return fit_net(name, real, self.measures, device, self._kept)

    def _images(self, name: str) -> Source:
        if self.source is None:
            raise InputError(f"{self.name} holds statistics of Inception: {name} needs images")
        return self.source

    def _real(self, net: FeatureNet) -> Summary:
        """Returns the summary of the real images; published statistics go before images."""
        if self._stored is None or not _is_inception(net):
            return self._kept(self._images(f"features {net.name}"), net)
        if self._stored.pooled.dim != net.dim:
            raise InputError(
                f"{self.name} has statistics of {self._stored.pooled.dim} dimensions, "
                f"{net.name} has {net.dim}"
            )
        if self._wanted(net).spatial and self._stored.spatial is None:
            raise InputError(f"{self.name} has no mu_s and sigma_s: sfid needs them")
        rows = None
        if {"kid", "prdc"} & set(self.measures.metrics):
            rows = self._kept(self._images("kid or prdc"), net).rows
        return Summary(self._stored.pooled, self._stored.spatial, rows)

    def _held_out_distances(self) -> dict[str, float] | None:
        """Returns how far real images are that training never saw: what perfect samples get."""
        if self.data is None or int(self.data.held_out.sum()) < 2:
            return None
        source = of_dataset(self.data, held_out=True)
        return {
            metric_name(net): frechet_distance(
                self._kept(source, net, Wanted()).pooled, real.pooled, allow_few=True
            )
            for net, real in zip(self.nets, self.summaries, strict=True)
        }

    def _wanted(self, net: FeatureNet) -> Wanted:
        """Returns what is kept of real images; of samples there may be more."""
        metrics = set(self.measures.metrics)
        return Wanted(bool({"kid", "prdc"} & metrics), "sfid" in metrics and _is_inception(net))

    def _summary(
        self, source: Source, net: FeatureNet, wanted: Wanted, progress: Progress = silent
    ) -> Summary:
        rows = source.share(self.world)
        return summarise(
            source.batches(rows, progress),
            net,
            wanted,
            first=rows.start,
            num=source.num,
            world=self.world,
        )

    def _kept(self, source: Source, net: FeatureNet, wanted: Wanted | None = None) -> Summary:
        """Returns the summary of real images, from the cache if it is there."""
        wanted = wanted or self._wanted(net)
        if self._cache is None:
            return self._summary(source, net, wanted)
        key = {
            "layout": 1,  # of the file; to be raised when `Summary.tensors` changes
            "images": self.world.first(source.fingerprint() if not self.world.rank else ""),
            "features": net.description(),
            "wanted": vars(wanted),
        }
        file = self._cache / f"{net.name}-{artifact.fingerprint(key)[:16]}.safetensors"
        if self.world.first(file.is_file()):
            return Summary.from_tensors(artifact.read_tensors(file, KIND)[0])
        found = self._summary(source, net, wanted)
        if not self.world.rank:
            try:
                artifact.write_tensors(file, KIND, found.tensors(), key, replace=True)
            except OSError as error:
                log.warning("features are not kept in %s: %s", self._cache, error.strerror)
        return found

    def _fingerprint(self) -> str:
        if self.data is not None:
            return self.data.fingerprint
        if self._stored is not None:
            return artifact.fingerprint(self._stored.pooled.mean.tolist())
        assert self.source is not None
        return self.source.fingerprint()


def cache_beside(path: Path) -> Path:
    """Returns the folder in which features of real images are kept, if no other is given."""
    path = path.absolute()
    return path.parent / f"{path.name}.statistics"


def _is_inception(net: FeatureNet) -> bool:
    return isinstance(net, Inception)
