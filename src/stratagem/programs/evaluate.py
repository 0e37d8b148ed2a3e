"""`stratagem evaluate`: how near samples are to the data, and how near to its single images.

    quality        distances of features between samples and real images, see `programs.measures`
    memorisation   distance to the nearest training image, beside that of held-out real images

Snippets come from training images, so every figure of a memory model has a second one beside it:
the same with snippets of held-out images. Evaluations of a run stay in RUN/evaluations/, with the
protocol that made them and a few samples, and `compare` draws its report from them.

A run's samples lie in RUN/evaluations/samples-* while it is evaluated: all processes make them, see
`programs.sample`, and a stopped evaluation goes on with those that are there.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import stratagem
from stratagem import artifact
from stratagem.assemble import Model
from stratagem.distributed import World
from stratagem.errors import InputError
from stratagem.metrics.memorisation import Memorisation, audit, nearest
from stratagem.programs import Progress, silent
from stratagem.programs.reference import Reference
from stratagem.programs.sample import SampleConfig, sample_into
from stratagem.programs.sources import Source, held, open_source

__all__ = [
    "Evaluation",
    "evaluate_images",
    "evaluate_run",
    "load_all",
    "load_preview",
    "sampled",
    "spread",
]

KIND = "evaluation"
_PREVIEW = 40


@dataclass(frozen=True)
class Evaluation:
    """The figures of one checkpoint, or of a folder of samples.

    Attributes:
        step: Of the checkpoint, 0 for samples.
        images: Training images seen by then.
        num: Samples evaluated.
        distances: Metric -> Frechet distance to the real images.
        held_out_snippets: All metrics with snippets of held-out images, or None.
        memorisation: Figures of the distance to the nearest training image, or None without
            held-out images to compare with.
        protocol: All that decides the figures.
        figures: Every other metric.
        intervals: Metric -> 95 % interval of other samples of the same source, see
            `metrics.frechet.Interval`.
    """

    step: int
    images: int
    num: int
    distances: dict[str, float]
    held_out_snippets: dict[str, float] | None
    memorisation: dict[str, float] | None
    protocol: dict[str, Any]
    figures: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, dict[str, float]] = field(default_factory=dict)


def evaluate_run(
    model: Model,
    reference: Reference,
    cfg: SampleConfig,
    *,
    held_out_snippets: bool = True,
    progress: Progress = silent,
) -> Evaluation:
    """Samples from a run and measures.

    The result is kept in the run's folder if it has all that `compare` shows: a Frechet distance
    to a data set, and the nearest training images. Under several processes all get the same
    figures, but those of memorisation, which process 0 has.

    Args:
        model: The run at one checkpoint.
        reference: What to compare with.
        cfg: How to sample.
        held_out_snippets: Whether a memory model is sampled a second time with held-out snippets.
        progress: Called while sampling.

    Raises:
        InputError: If sizes do not fit, or there are too few images for the features.
    """
    # before the work, not after it
    reference.require(model.finish.shape, cfg.num)
    measures, world = reference.measures, reference.world
    model = _rounded(model, measures.rounding)
    second = None
    from_all = cfg.snippets == "train" and cfg.label is None
    bank = model.bank if held_out_snippets and from_all else None
    if bank is not None and bool(bank.held_out.any()):
        others = dataclasses.replace(cfg, snippets="held-out")
        with sampled(model, others, world, progress) as samples:
            found = reference.measure(samples)
        second = {**found.distances, **found.others}
    protocol = {
        "run": str(model.path),
        "ema_std": model.ema_std,
        "sampling": dataclasses.asdict(cfg),
        "rounding": measures.rounding,
    }
    with sampled(model, cfg, world, progress) as samples:
        result = dataclasses.replace(
            _evaluate(samples, reference, protocol),
            step=model.step,
            images=model.step * model.config.train.batch_size,
            held_out_snippets=second,
        )
        whole = measures.memorisation and "fd" in measures.metrics and model.ema_std is None
        if reference.data is not None and whole and not world.rank:
            path = model.path / "evaluations" / f"step-{model.step:08d}"
            _save(path, result, samples.read(0, min(_PREVIEW, samples.num)), reference)
    return result


@contextmanager
def sampled(
    model: Model,
    cfg: SampleConfig,
    world: World,
    progress: Progress = silent,
    *,
    use: str = "samples",
) -> Iterator[Source]:
    """Yields samples of a run, made by all processes; the files go when they are done with.

    Args:
        model: The run at one checkpoint.
        cfg: How to sample.
        world: The processes; all must come here.
        progress: Called while sampling, with the images of this process.
        use: What they are for: files of two uses stand side by side.

    Raises:
        InputError: If a setting is impossible, or the samples would be latents.
    """
    channels = model.finish.shape[0]
    if channels not in {1, 3}:
        raise InputError(f"samples of {model.path} are latents: give --autoencoder")
    made = [model.step, model.ema_std, model.finish.floor, model.finish.description()]
    bank = None if model.bank is None else model.bank.fingerprint
    name = artifact.fingerprint([dataclasses.asdict(cfg), bank, *made])[:16]
    out = model.path / "evaluations" / f"{use}-{name}"
    with world.together():
        sample_into(
            model, cfg, out, form="npz", rank=world.rank, world=world.size, progress=progress
        )
    yield open_source(out, channels)
    if not world.rank:
        shutil.rmtree(out, ignore_errors=True)


def evaluate_images(
    images: Tensor | Path, reference: Reference, *, progress: Progress = silent
) -> Evaluation:
    """Measures samples, uint8 (N, C, H, W) or wherever they are, against a reference.

    Raises:
        InputError: If there are none, sizes do not fit, or there are too few for the features.
    """
    if reference.measures.rounding != "nearest":
        raise InputError("--rounding has no effect: these images are whole numbers already")
    if isinstance(images, Tensor):
        samples = held(images)
    else:
        real = reference.source
        samples = open_source(images, None if real is None else real.shape[0])
    protocol = {"samples": samples.name, "rounding": "as stored"}
    return _evaluate(samples, reference, protocol, progress)


def spread(found: Sequence[Evaluation]) -> dict[str, dict[str, float]]:
    """Returns mean, standard deviation, least and largest of each metric over several targets."""
    rows = [{**e.distances, **e.figures} for e in found]
    common = [name for name in rows[0] if all(name in row for row in rows)]
    columns = {name: [row[name] for row in rows] for name in common}
    return {
        name: {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values),
            "min": min(values),
            "max": max(values),
        }
        for name, values in columns.items()
    }


def _evaluate(
    samples: Source,
    reference: Reference,
    protocol: dict[str, Any],
    progress: Progress = silent,
) -> Evaluation:
    reference.require(samples.shape, samples.num)
    found = reference.measure(samples, progress)
    copying = None
    if reference.held_out is not None and not reference.world.rank:
        flip = reference.data is not None and reference.data.flip
        found_near = audit(samples.all(), reference.train, reference.held_out, flip=flip)
        copying = _figures(found_near)
    return Evaluation(
        0,
        0,
        samples.num,
        found.distances,
        None,
        copying,
        {**protocol, **reference.description(), **_versions(reference)},
        found.others,
        {name: interval._asdict() for name, interval in found.intervals.items()},
    )


def _rounded(model: Model, rounding: str) -> Model:
    """Returns a run whose pixels u = 127.5 x + 127.5 become whole numbers in a given way."""
    if rounding == "floor" and model.finish.statistics is not None:
        raise InputError("--rounding floor is not for runs of latents: a decoder rounds by itself")
    finish = dataclasses.replace(model.finish, floor=rounding == "floor")
    return dataclasses.replace(model, finish=finish)


def _versions(reference: Reference) -> dict[str, Any]:
    return {
        "device": reference.world.device.type,
        "versions": {
            "stratagem": stratagem.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


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


def _save(path: Path, result: Evaluation, first: Tensor, reference: Reference) -> None:
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
