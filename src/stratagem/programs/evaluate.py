"""`stratagem evaluate`: how near samples are to the data, and how near to its single images.

    quality        Frechet distance of features between samples and training images
    memorisation   distance to the nearest training image, beside that of held-out real images

Snippets come from training images, so every figure of a memory model has a second one beside it:
the same with snippets of held-out images. Evaluations of a run stay in RUN/evaluations/, with the
protocol that made them and a few samples, and `compare` draws its report from them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stratagem import artifact
from stratagem.assemble import Model
from stratagem.data.shards import DataSet
from stratagem.encoders import build_encoder
from stratagem.errors import InputError
from stratagem.metrics.features import (
    Components,
    EncoderFeatures,
    FeatureNet,
    PixelComponents,
    metric_name,
    statistics_of,
)
from stratagem.metrics.frechet import Statistics, frechet_distance, refuse_few
from stratagem.metrics.inception import load_inception
from stratagem.metrics.memorisation import Memorisation, audit, nearest
from stratagem.programs import Progress, silent
from stratagem.programs.sample import SampleConfig, sample_run

__all__ = [
    "Evaluation",
    "FeatureName",
    "Reference",
    "evaluate_images",
    "evaluate_run",
    "load_all",
    "load_preview",
]

KIND = "evaluation"
FeatureName = Literal["pixels", "effnet", "inception"]
_PREVIEW = 40


class Reference:
    """The real images that samples are compared with, and their statistics, computed once.

    Args:
        path: The data set artifact.
        features: Names of the feature nets.
        weights: Weights file of the Inception net, for "inception" and only for it.

    Raises:
        InputError: If the data is missing, or features and weights do not fit.
    """

    def __init__(
        self, path: Path, features: Sequence[FeatureName], weights: Path | None = None
    ) -> None:
        if ("inception" in features) != (weights is not None):
            raise InputError("features inception needs --weights FILE, and nothing else takes it")
        data = DataSet.open(path)
        self.data = data
        self.train = data.images(data.train_indices)
        self.held_out = data.images(data.held_out_indices)
        self.nets = [self._net(name, weights) for name in features]
        self.statistics = [_statistics(self.train, net) for net in self.nets]
        self.held_out_distances = (
            self.distances(self.held_out, allow_few=True) if len(self.held_out) > 1 else None
        )

    def _net(self, name: FeatureName, weights: Path | None) -> FeatureNet:
        match name:
            case "pixels":
                most = min(len(self.train) - 1, self.train[0].numel())
                return PixelComponents.fit(self.train, min(32, most))
            case "effnet":
                return self._effnet()
            case "inception":
                assert weights is not None
                return load_inception(weights)

    def _effnet(self) -> FeatureNet:
        """All 1,280 features where there are images enough for them, else their 64 components."""
        encoder = build_encoder("effnet", self.data.shape)
        if len(self.train) >= 4 * encoder.dim:
            return EncoderFeatures(encoder)
        vectors = torch.cat([encoder(images) for images in self.train.split(256)])
        return EncoderFeatures(encoder, Components.fit(vectors, min(64, len(vectors) - 1)))

    def require(self, shape: Sequence[int], num: int, *, allow_few: bool) -> None:
        """Refuses samples that cannot be measured.

        Raises:
            InputError: If they have another shape (C, H, W), or are too few for the features.
        """
        if tuple(shape) != self.train.shape[1:]:
            raise InputError(
                f"samples of shape {tuple(shape)} cannot be compared with data of shape "
                f"{tuple(self.train.shape[1:])}: prepare the data at the samples' size"
            )
        for net in () if allow_few else self.nets:
            refuse_few(num, net.dim)

    def distances(self, images: Tensor, *, allow_few: bool = False) -> dict[str, float]:
        """Returns the Frechet distance to the training images, for each feature net by its name."""
        return {
            metric_name(net): frechet_distance(_statistics(images, net), real, allow_few=allow_few)
            for net, real in zip(self.nets, self.statistics, strict=True)
        }


@dataclass(frozen=True)
class Evaluation:
    """The figures of one checkpoint, or of a folder of samples.

    Attributes:
        step: Of the checkpoint, 0 for samples.
        images: Training images seen by then.
        num: Samples evaluated.
        distances: Metric -> Frechet distance to the training images.
        held_out_snippets: The same with snippets of held-out images, or None.
        memorisation: Figures of the distance to the nearest training image, or None without
            held-out images to compare with.
        protocol: All that decides the figures.
    """

    step: int
    images: int
    num: int
    distances: dict[str, float]
    held_out_snippets: dict[str, float] | None
    memorisation: dict[str, float] | None
    protocol: dict[str, Any]


def evaluate_run(
    model: Model,
    reference: Reference,
    cfg: SampleConfig,
    *,
    held_out_snippets: bool = True,
    allow_few: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Samples from a run, measures, and keeps the result in the run's folder.

    Args:
        model: The run at one checkpoint.
        reference: What to compare with.
        cfg: How to sample.
        held_out_snippets: Whether a memory model is sampled a second time with held-out snippets.
        allow_few: Whether a distance may be taken of fewer images than dimensions.
        progress: Called while sampling.

    Raises:
        InputError: If sizes do not fit, or there are too few images for the features.
    """
    reference.require(model.shape, cfg.num, allow_few=allow_few)  # before the work, not after it
    images = sample_run(model, cfg, progress=progress).images
    second = None
    if held_out_snippets and model.bank is not None and bool(model.bank.held_out.any()):
        held = sample_run(model, dataclasses.replace(cfg, snippets="held-out"), progress=progress)
        second = reference.distances(held.images, allow_few=allow_few)
    result = evaluate_images(
        images,
        reference,
        protocol={"sampling": dataclasses.asdict(cfg)},
        allow_few=allow_few,
    )
    result = dataclasses.replace(
        result,
        step=model.step,
        images=model.step * model.config.train.batch_size,
        held_out_snippets=second,
    )
    _save(model.path / "evaluations" / f"step-{model.step:08d}", result, images, reference)
    return result


def evaluate_images(
    images: Tensor, reference: Reference, *, protocol: dict[str, Any], allow_few: bool = False
) -> Evaluation:
    """Measures samples, uint8 (N, C, H, W), against a reference.

    Raises:
        InputError: If sizes do not fit, or there are too few images for the features.
    """
    reference.require(images.shape[1:], len(images), allow_few=allow_few)
    memorisation = None
    if len(reference.held_out):
        memorisation = _figures(audit(images, reference.train, reference.held_out))
    described = {
        **protocol,
        "reference": reference.data.fingerprint,
        "reference_images": len(reference.train),
        "held_out_images": len(reference.held_out),
        "features": [net.description() for net in reference.nets],
        "held_out_real": reference.held_out_distances,
    }
    distances = reference.distances(images, allow_few=allow_few)
    return Evaluation(0, 0, len(images), distances, None, memorisation, described)


def load_all(run: Path) -> list[Evaluation]:
    """Reads the evaluations of a run, by step.

    Raises:
        InputError: If there is none.
    """
    folders = sorted((run / "evaluations").glob("step-*"))
    if not folders:
        raise InputError(f"{run} has no evaluation: run  stratagem evaluate {run} --reference DATA")
    for folder in folders:
        artifact.read_folder(folder, KIND)
    return [Evaluation(**json.loads((f / "evaluation.json").read_text())) for f in folders]


def load_preview(run: Path, step: int) -> dict[str, Tensor]:
    """Reads the samples kept with an evaluation, their nearest training images and distances."""
    return artifact.read_tensor_file(
        run / "evaluations" / f"step-{step:08d}" / "preview.safetensors"
    )


def _save(path: Path, result: Evaluation, images: Tensor, reference: Reference) -> None:
    first = images[:_PREVIEW]
    distances, index = nearest(first.flatten(1), reference.train.flatten(1))
    scale = 255 * first[0].numel() ** 0.5  # per-pixel RMS in [0, 1], as the audit's
    preview = {
        "samples": first,
        "neighbours": reference.train[index],
        "distances": distances / scale,
    }
    with artifact.write_folder(path, KIND, {"step": result.step}, replace=True) as folder:
        body = json.dumps(dataclasses.asdict(result), indent=1)
        (folder / "evaluation.json").write_text(body)
        artifact.write_tensor_file(folder / "preview.safetensors", preview)


def _figures(found: Memorisation) -> dict[str, float]:
    names = ("median", "held_out_median", "ratio", "copy_rate", "copy_rate_min", "p_value")
    return {name: getattr(found, name) for name in (*names, "authentic")}


def _statistics(images: Tensor, net: FeatureNet) -> Statistics:
    with torch.no_grad():
        return statistics_of(images.split(256), net)
