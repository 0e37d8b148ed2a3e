"""`stratagem audit`: are samples copies of training images?

    distances     to the nearest training image, beside those of held-out real images: in pixels and
                  in the vectors of frozen networks
    diversity     how much images of one snippet differ
    quality       Frechet distance with snippets of training images and of held-out ones

Of training images only vectors are kept, in a file that is mapped while the audit runs, and pixels
are read from the data set: memory does not grow with their number.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from stratagem import __version__
from stratagem.data.shards import DataSet
from stratagem.distributed import World
from stratagem.encoders import EncoderName
from stratagem.errors import InputError
from stratagem.metrics.diversity import Diversity, diversity
from stratagem.metrics.features import EncoderFeatures
from stratagem.metrics.memorisation import LEVEL, Memorisation, Vectors, audit_vectors
from stratagem.metrics.nearest import Rows
from stratagem.programs import Progress, silent
from stratagem.programs.audited import Audited
from stratagem.programs.measures import Measures
from stratagem.programs.reference import Reference
from stratagem.programs.sources import Source, held, of_dataset

__all__ = ["Audit", "Judge", "Verdict", "percent", "probability", "verdict"]

Encode = Callable[[Tensor], Tensor]
_HELD_OUT = 10_000  # at most so many held-out images, evenly spaced
_SIDE = 64  # pixels are compared on at most so many rows and columns
_PAIRS = 20


@dataclass(frozen=True)
class Verdict:
    """What an audit comes to.

    Attributes:
        kind: "copies"; "near" to training images without copying any; "clear"; or "unknown".
        sentence: The same in words, with evidence and uncertainty.
    """

    kind: Literal["copies", "near", "clear", "unknown"]
    sentence: str


@dataclass(frozen=True)
class Audit:
    """Everything an audit found.

    Attributes:
        audited: The samples.
        data: The data set.
        spaces: By name of the space, "pixels" first.
        diversity: By name of the space; empty if no two images have the same snippet.
        quality: By kind of snippets: Frechet distances by metric.
        protocol: All that decides the figures, JSON-able.
    """

    audited: Audited
    data: DataSet
    spaces: dict[str, Memorisation]
    diversity: dict[str, Diversity]
    quality: dict[str, dict[str, float]]
    protocol: dict[str, Any]

    @property
    def verdict(self) -> Verdict:
        """What it comes to."""
        return verdict(self.spaces)

    def pairs(self, space: str, num: int = _PAIRS) -> tuple[Tensor, Tensor]:
        """Returns the closest pairs: numbers of samples and of images of the data set, (num,)."""
        found = self.spaces[space]
        samples = found.nearest_pairs(num)
        return samples, self.data.train_indices[found.neighbours[samples]]

    def record(self) -> dict[str, Any]:
        """Returns everything, JSON-able."""
        body = {
            "verdict": self.verdict.kind,
            "sentence": self.verdict.sentence,
            "spaces": {name: self._space(name) for name in self.spaces},
            "diversity": {name: d._asdict() for name, d in self.diversity.items()},
            "quality": self.quality,
            "protocol": self.protocol,
        }
        return _known(body)

    def _space(self, name: str) -> dict[str, Any]:
        found = self.spaces[name]
        samples, images = (column.tolist() for column in self.pairs(name))
        return {
            "median": found.median,
            "held_out_median": found.held_out_median,
            "distance_ratio": found.ratio,
            "copied": found.copied._asdict(),
            "near": found.near._asdict(),
            "level": found.level,
            "c_t": found.score,
            "auth_pct": 100 * found.authentic,
            "pairs": [
                {
                    "sample": sample,
                    "image": image,
                    "name": self.data.names[image],
                    "distance": float(found.distances[sample]),
                }
                for sample, image in zip(samples, images, strict=True)
            ],
        }


def verdict(spaces: Mapping[str, Memorisation]) -> Verdict:
    """Judges samples by all spaces: one that shows copies at its level is enough.

    Args:
        spaces: What was found in each space, by its name.
    """
    first = next(iter(spaces.values()))
    num, held_out = len(first.distances), len(first.held_out)
    if held_out < 2:
        text = (
            "Whether these samples are copies cannot be judged: the data set has no held-out "
            "images, so nothing says how near real images come (stratagem prepare --holdout)."
        )
        return Verdict("unknown", text)
    name, copied = min(((n, m.copied) for n, m in spaces.items()), key=lambda item: item[1].p_value)
    if all(m.copied.limit > num for m in spaces.values()):
        text = (
            f"{num} samples and {held_out} held-out images are too few to tell copies from chance: "
            "sample more, or hold out more images."
        )
        return Verdict("unknown", text)
    rank = max(1, held_out // 100)
    evidence = (
        f"{copied.num:,} of {num:,} samples ({percent(copied.rate)}) are as near to one training "
        f"image, relative to the nearest held-out image, as the nearest {rank} of {held_out:,} "
        f"held-out real images; {percent(rank / (held_out + 1))} is chance (in {name}, p "
        f"{probability(copied.p_value)})."
    )
    if copied.p_value < first.level:
        return Verdict("copies", f"These samples hold copies: {evidence}")
    limit = min(m.copied.limit for m in spaces.values())
    unseen = f"Fewer than {limit:,} copies in {num:,} would not have been noticed."
    near = [n for n, m in spaces.items() if m.near.p_value < m.level or m.score < -3]
    if near:
        text = (
            "No copies were found, but the samples are nearer to training images than real images "
            f"are (in {' and '.join(near)}). They are as near to held-out images, so they may be "
            f"plainer or less varied than the data: look at the pairs. {unseen}"
        )
        return Verdict("near", text)
    return Verdict("clear", f"No sign of copying: {evidence} {unseen}")


class Judge:
    """Compares samples with the images of a data set.

    Args:
        data: The data set; of images.
        features: Networks whose vectors are compared beside pixels; quality is measured by them.
        weights: Those of a DINO: a folder, or a repository of the hub.
        device: Where it computes.
        scratch: Folder for the vectors of training images while it works.
        cache: Folder in which statistics of real images are kept, if there is one.

    Raises:
        InputError: If the data set holds latents, or settings do not fit.
    """

    def __init__(
        self,
        data: DataSet,
        features: Sequence[EncoderName],
        weights: str | None = None,
        *,
        device: torch.device,
        scratch: Path,
        cache: Path | None = None,
    ) -> None:
        data.require_images()
        if "pixels" in features:
            raise InputError("pixels are compared in any case: name networks as --features")
        self.data, self.device, self._scratch = data, device, scratch
        self._train = of_dataset(data)
        places = torch.linspace(0, 1, min(_HELD_OUT, int(data.held_out.sum())))
        rows = data.held_out_indices
        self._held_out = data.images(rows[(places * (len(rows) - 1)).long()])
        measures = Measures(encoder_weights=weights, memorisation=False)
        self._reference = (
            Reference(data.path, features, measures, world=World(device=device), cache=cache)
            if features
            else None
        )

    def require(self, shape: tuple[int, ...]) -> None:
        """Refuses samples of another shape (C, H, W) than the data's.

        Raises:
            InputError: If they have one.
        """
        if tuple(shape) != self.data.shape:
            raise InputError(
                f"samples of shape {tuple(shape)} cannot be compared with images of "
                f"{self.data.shape}: give the data set that they were to be like, at their size"
            )

    def audit(self, audited: Audited, *, progress: Progress = silent) -> Audit:
        """Audits samples.

        Args:
            audited: The samples.
            progress: Called with how many images have been compared.

        Raises:
            InputError: If sizes do not fit, or there is one training image only.
        """
        self.require(audited.images.shape[1:])
        encoders: dict[str, Encode] = {"pixels": _pixels}
        for net in self._reference.nets if self._reference else ():
            plain = net.encoder if isinstance(net, EncoderFeatures) else net
            encoders[plain.name] = plain
        spaces, spread = dict[str, Memorisation](), dict[str, Diversity]()
        asked = (1 + self.data.flip) * (len(audited.images) + len(self._held_out))
        asked += 0 if audited.repeats is None else len(audited.repeats[0])
        count = _Count(progress, len(encoders) * (self._train.num + asked))
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            for name, encode in encoders.items():
                train = self._rows(name, encode, Path(folder) / name, count)
                vectors = self._vectors(audited.images, encode, train, count)
                spaces[name] = audit_vectors(vectors, level=LEVEL / len(encoders))
                if audited.repeats is not None:
                    images, snippets = audited.repeats
                    rows = self._encode(encode, images, count).double() / vectors.scale
                    found = diversity(rows, snippets)
                    spread |= {name: found} if found is not None else {}
        quality, told = self._quality(audited), self._told(audited)
        return Audit(audited, self.data, spaces, spread, quality, told)

    def _rows(self, name: str, encode: Encode, file: Path, count: _Count) -> Tensor | Rows:
        """Returns the vectors of the training images, none of them in memory."""
        if name == "pixels":
            return _PixelRows(self.data, encode, count)
        rows, at = torch.empty(0), 0
        for images in self._train.batches():
            vectors = encode(images).float().cpu()
            if not at:
                size = self._train.num * vectors.shape[1]
                rows = torch.from_file(str(file), shared=True, size=size).view(-1, vectors.shape[1])
            rows[at : at + len(vectors)] = vectors
            at += len(vectors)
            count(len(vectors))
        return rows

    def _vectors(
        self, images: Tensor, encode: Encode, train: Tensor | Rows, count: _Count
    ) -> Vectors:
        def sides(pictures: Tensor, count: Callable[[int], None] = lambda _: None) -> Tensor:
            both = (pictures, pictures.flip(-1)) if self.data.flip else (pictures,)
            return torch.stack([self._encode(encode, side, count) for side in both])

        def of_train(index: Tensor) -> Tensor:
            return sides(self.data.images(self.data.train_indices[index]))

        samples = sides(images, count)
        nothing = samples[:, :0]
        real = sides(self._held_out, count) if len(self._held_out) else nothing
        scale = 255 * math.sqrt(samples.shape[-1]) if encode is _pixels else 1.0
        return Vectors(samples, real, train, of_train, scale)

    @torch.no_grad()
    def _encode(self, encode: Encode, images: Tensor, count: Callable[[int], None]) -> Tensor:
        found = []
        for part in images.split(128):
            found.append(encode(part).to(self.device))
            count(len(part))
        return torch.cat(found)

    def _quality(self, audited: Audited) -> dict[str, dict[str, float]]:
        """Measures Frechet distances; nothing where samples are too few for the features."""
        sets = {"samples": audited.images, "held-out snippets": audited.held_out_snippets}
        reference = self._reference
        if reference is None or not _enough(reference, held(audited.images)):
            return {}
        found = {
            kind: reference.measure(held(images)).distances
            for kind, images in sets.items()
            if images is not None
        }
        real = reference.held_out_distances
        return found | ({"held-out real images": real} if real is not None else {})

    def _told(self, audited: Audited) -> dict[str, Any]:
        known = self._reference.description() if self._reference else {"features": []}
        return {
            **audited.protocol,
            "samples_used": len(audited.images),
            "data": str(self.data.path),
            "fingerprint": self.data.fingerprint,
            "training_images": self._train.num,
            "held_out_images": len(self._held_out),
            "mirrored": self.data.flip,
            "features": known["features"],
            "pixels": f"Euclidean, area means to at most {_SIDE} x {_SIDE}, RMS of [0, 1]",
            "level": LEVEL,
            "device": self.device.type,
            "stratagem": __version__,
        }


@dataclass
class _Count:
    """Adds up images, of a known total."""

    progress: Progress
    total: int
    done: int = 0

    def __call__(self, num: int) -> None:
        self.done += num
        self.progress(self.done, self.total)


@dataclass
class _PixelRows:
    """The training images as rows, read when they are asked for, and counted when read first."""

    data: DataSet
    encode: Encode
    count: _Count
    counted: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.data.train_indices), self[torch.tensor([0])].shape[1]

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        rows = self.data.train_indices
        if isinstance(index, slice):
            stop = min(index.stop, len(rows))
            self.count(max(0, stop - self.counted))
            self.counted = max(stop, self.counted)
        return self.encode(self.data.images(rows[index]))


def _enough(reference: Reference, samples: Source) -> bool:
    try:
        reference.require(samples.shape, samples.num)
    except InputError:
        return False
    return True


def _pixels(images: Tensor) -> Tensor:
    """Images as rows of bytes, large ones as means of areas: (B, C, H, W) -> (B, D)."""
    height, width = images.shape[2:]
    if max(height, width) > _SIDE:
        size = (min(height, _SIDE), min(width, _SIDE))
        return functional.adaptive_avg_pool2d(images.float(), size).flatten(1)
    return images.flatten(1)


def _known(body: Any) -> Any:
    """Puts None for what is not known, for JSON has no NaN."""
    if isinstance(body, dict):
        return {key: _known(value) for key, value in body.items()}
    if isinstance(body, list):
        return [_known(value) for value in body]
    return None if isinstance(body, float) and math.isnan(body) else body


def percent(share: float) -> str:
    """Writes a share for people."""
    return f"{100 * share:.1f} %"


def probability(value: float) -> str:
    """Writes a probability for people."""
    return "below 1e-6" if value < 1e-6 else f"{value:.2g}"
