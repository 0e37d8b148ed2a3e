"""`stratagem evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from stratagem.cli.console import progress_bar, say, say_json
from stratagem.cli.opening import Opened, Opening
from stratagem.distributed import connect
from stratagem.errors import InputError
from stratagem.programs import Device
from stratagem.programs.evaluate import (
    Evaluation,
    evaluate_images,
    evaluate_run,
    sampled,
    spread,
)
from stratagem.programs.measures import FeatureName, Measures
from stratagem.programs.reference import Reference, cache_beside
from stratagem.programs.sample import SampleConfig
from stratagem.programs.sources import Source

__all__ = ["evaluate"]

_MEASURES = Measures()
_SAMPLING, _OPENING = SampleConfig(num=2000), Opening()


def evaluate(
    targets: Positional[tuple[Path, ...]],
    /,
    reference: Path,
    features: tuple[FeatureName, ...] = ("effnet",),
    measures: Annotated[Measures, tyro.conf.arg(name="")] = _MEASURES,
    config: Annotated[SampleConfig, tyro.conf.arg(name="")] = _SAMPLING,
    opening: Opened = _OPENING,
    cache: Path | None = None,
    device: Device = "auto",
    json: Path | None = None,
) -> None:
    """Measures runs, or samples, against real images.

    Of several targets, such as runs of several seeds, the spread is told too. Images are read in
    batches. Under torchrun the processes share sampling and features, and the figures are those of
    one process. Killed, the same command goes on from the samples that are there.

    Example: stratagem evaluate runs/digits --reference out/digits --features pixels
    Example: stratagem evaluate samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    --features inception --fetch --metrics fd sfid is prdc --json figures.json

    Args:
        targets: Runs, folders of images, npz files in ADM's layout, data sets.
        reference: A data set, or any other of the above, or an npz of statistics (mu, sigma).
        features: Feature nets: inception (a true FID), effnet, pixels (principal components), or
            a DINO: dinov2-l is that of published FD-DINOv2.
        measures: What is measured, and how.
        config: How a run is sampled.
        opening: How a run is opened.
        cache: Folder of the features of real images; REFERENCE.statistics by default.
        device: Where networks run; auto takes a GPU where there is one.
        json: Write the figures and the whole protocol to this file.
    """
    runs = [path for path in (*targets, reference) if (path / "config.yaml").is_file()]
    if not targets:
        raise InputError("name at least one run, folder of images, npz or data set")
    missing = [path for path in (*targets, reference) if not path.exists()]
    if missing:
        raise InputError(f"nothing at {missing[0]}: give a run, folder of images, npz or data set")
    if not runs and (config != _SAMPLING or opening != _OPENING):
        raise InputError("settings of sampling have no effect: there is no run to sample")
    with connect(device) as world, ExitStack() as files:
        images: Path | Source = reference
        if reference in runs:
            made = sampled(opening.model(reference, world.device), config, world, use="reference")
            images = files.enter_context(made)
        kept = cache or cache_beside(reference)
        real = Reference(images, features, measures, world=world, cache=kept)
        found = []
        for path in targets:
            with progress_bar("evaluate", "images") as progress:
                if path in runs:
                    model = opening.model(path, world.device)
                    one = evaluate_run(model, real, config, progress=progress)
                else:
                    one = evaluate_images(path, real, progress=progress)
                found.append(one)
    if not world.rank:
        _tell(targets, found, json)


def _tell(targets: Sequence[Path], found: Sequence[Evaluation], json: Path | None) -> None:
    for target, one in zip(targets, found, strict=True):
        _print(target, one)
    if len(found) > 1:
        say(f"over {len(found)} targets")
        for name, s in spread(found).items():
            ends = f"({s['min']:.4f} to {s['max']:.4f})"
            say(f"  {name:<24} {s['mean']:.4f} +- {s['std']:.4f}   {ends}")
    if json is not None:
        bodies = [dataclasses.asdict(one) for one in found]
        body = bodies[0] if len(bodies) == 1 else {"targets": bodies, "spread": spread(found)}
        say_json(body, json)


def _print(target: Path, found: Evaluation) -> None:
    real = found.protocol["reference_images"]
    against = "published statistics" if real is None else f"{real:,} real images"
    say(f"{target}: {found.num:,} samples against {against}")
    for name, value in {**found.distances, **found.figures}.items():
        second = (found.held_out_snippets or {}).get(name)
        beside = "" if second is None else f"   with held-out snippets {second:.4f}"
        interval = found.intervals.get(name)
        ends = (
            "" if interval is None else f"   95 %: {interval['low']:.4f} to {interval['high']:.4f}"
        )
        say(f"  {name:<24} {value:.4f}{ends}{beside}")
    if found.memorisation is None:
        say(
            "  memorisation  not measured: no images held out (prepare --holdout), or not asked for"
        )
        return
    m = found.memorisation
    say(
        f"  nearest training image at {m['median']:.4f}, of held-out real images at "
        f"{m['held_out_median']:.4f}, copy rate by distance {100 * m['copy_rate']:.1f} % (1 % is "
        "chance; plain images are near, too:  stratagem audit  tells them from copies)"
    )
