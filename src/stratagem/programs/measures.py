"""What `stratagem evaluate` measures, and the feature nets that it takes.

    fd     Frechet distance of each feature net; with the Inception-v3 of FID it is FID
    sfid   Frechet distance of spatial Inception features
    is     Inception Score, which sees no real images
    kid    kernel distance of each feature net
    prdc   precision, recall, density and coverage of each feature net

Some nets are fitted on the real images: principal components of the pixels, and of EfficientNet's
features where there are too few images for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from stratagem.data.images import to_float
from stratagem.encoders import EncoderName, build_encoder
from stratagem.errors import InputError
from stratagem.metrics.features import (
    MOST,
    Components,
    EncoderFeatures,
    FeatureNet,
    PixelComponents,
)
from stratagem.metrics.frechet import statistics
from stratagem.metrics.inception import Inception, Resize, fetch_inception, load_inception
from stratagem.metrics.summary import Summary, Wanted
from stratagem.programs.sources import Source

__all__ = ["FeatureName", "Measures", "MetricName", "check", "fit_net", "load_net"]

FeatureName = Literal[EncoderName, "inception"]
MetricName = Literal["fd", "sfid", "is", "kid", "prdc"]


@dataclass(frozen=True)
class Measures:
    """What is measured, and how.

    Attributes:
        metrics: fd (Frechet distance), sfid, is (Inception Score), kid (kernel distance), prdc
            (precision, recall, density, coverage). sfid and is need features inception.
        weights: The Inception-v3 weights file: pytorch-fid's state dict or NVIDIA's TorchScript.
        trust: Take weights of unknown SHA-256; their distance bears another name than FID. Only for
            files from people whose programs you would run: TorchScript is one.
        resize: How Inception's images are resized: tensorflow (by default; as ADM's statistics
            were made) or pytorch-fid; TorchScript resizes by itself.
        fetch: Download pytorch-fid's file, known by its sum, if it is not here yet.
        encoder_weights: Weights of features dinov2-l and the like: a folder, or a repository of
            the hub.
        neighbours: Which neighbour the balls of prdc reach to: 5 is the package prdc's, 3 that of
            Kynkaanniemi's and ADM's precision and recall.
        bootstrap: How often samples are redrawn for the 95 % interval of fd; 0 for none.
        rounding: How a run's pixels become integers: nearest, or floor, which some programs do.
        memorisation: Measure distances to training images, which are held in memory for it.
        allow_few: Measure fewer images than the features have dimensions.
    """

    metrics: tuple[MetricName, ...] = ("fd",)
    weights: Path | None = None
    trust: bool = False
    resize: Resize | None = None
    fetch: bool = False
    encoder_weights: str | None = None
    neighbours: int = 5
    bootstrap: int = 0
    rounding: Literal["nearest", "floor"] = "nearest"
    memorisation: bool = True
    allow_few: bool = False


def check(features: Sequence[FeatureName], m: Measures) -> None:
    """Refuses settings that have no effect or cannot be met.

    Raises:
        InputError: The first of them.
    """
    inception = "inception" in features
    if inception and m.weights is None and not m.fetch:
        raise InputError("features inception needs --weights FILE, or --fetch")
    if not inception and (m.weights is not None or m.trust or m.resize is not None):
        raise InputError("--weights, --trust and --resize have no effect without inception")
    if m.fetch and (m.weights is not None or not inception):
        raise InputError("--fetch has no effect: there are no weights to fetch")
    if m.encoder_weights is not None and not any(name.startswith("dino") for name in features):
        raise InputError("--encoder-weights has no effect: no features are those of a DINO")
    if not inception and {"sfid", "is"} & set(m.metrics):
        raise InputError("metrics sfid and is need --features inception")
    if m.bootstrap and "fd" not in m.metrics:
        raise InputError("--bootstrap has no effect without the metric fd")
    if not features or not m.metrics:
        raise InputError("name at least one of --features and one of --metrics")


def load_net(m: Measures, device: torch.device) -> Inception:
    """Returns the Inception-v3 that is asked for.

    Raises:
        InputError: If its weights are not to be had, or do not give what a metric needs.
    """
    weights = m.weights or fetch_inception()
    net = load_inception(weights, device, resize=m.resize, trust=m.trust)
    if "sfid" in m.metrics and not net.spatial:
        raise InputError(f"{weights} gives no features for sfid: take pytorch-fid's state dict")
    return net


def fit_net(
    name: EncoderName,
    real: Source,
    m: Measures,
    device: torch.device,
    summarised: Callable[[Source, FeatureNet, Wanted], Summary],
) -> FeatureNet:
    """Returns any other feature net, fitted on real images where it has to be.

    Args:
        name: Of the net.
        real: The images.
        m: What is measured, and how.
        device: Where the net runs.
        summarised: Gives what is wanted of images: made by all processes, and kept.

    Raises:
        InputError: If its weights are not to be had, or there are too few images.
    """
    if name == "pixels":
        return _pixels(real)
    weights = None if name == "effnet" else m.encoder_weights
    encoder = build_encoder(name, real.shape, weights=weights, device=device)
    plain = EncoderFeatures(encoder)
    if name != "effnet" or real.num >= 4 * encoder.dim:
        return plain
    vectors = summarised(real, plain, Wanted(rows=True)).rows
    assert vectors is not None
    return EncoderFeatures(encoder, Components.fit(vectors, min(64, len(vectors) - 1)))


def _pixels(real: Source) -> FeatureNet:
    """The components are of all images, or where those would be too large of 4096 of them."""
    channels, height, width = real.shape
    dim = channels * height * width
    components = min(32, real.num - 1, dim)
    if real.num > MOST >= dim:
        found = statistics(to_float(images).flatten(1) for images in real.batches())
        return PixelComponents(Components.of(found, components), real.shape)
    some = torch.linspace(0, real.num - 1, min(real.num, MOST)).long().tolist()
    return PixelComponents.fit(torch.cat([real.read(n, n + 1) for n in some]), components)
