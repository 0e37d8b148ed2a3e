"""`stratagem evaluate`."""

from __future__ import annotations

import dataclasses
import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from stratagem.assemble import Model, open_run
from stratagem.cli.console import progress_bar, say
from stratagem.distributed import connect
from stratagem.errors import InputError
from stratagem.programs.evaluate import (
    Evaluation,
    FeatureName,
    Measures,
    Reference,
    evaluate_images,
    evaluate_run,
    spread,
)
from stratagem.programs.sample import SampleConfig, sample_run
from stratagem.programs.sources import Source, held

__all__ = ["evaluate"]

_MEASURES = Measures()
_SAMPLING = SampleConfig(num=2000)


def evaluate(
    targets: Positional[tuple[Path, ...]],
    /,
    reference: Path,
    features: tuple[FeatureName, ...] = ("effnet",),
    measures: Annotated[Measures, tyro.conf.arg(name="")] = _MEASURES,
    config: Annotated[SampleConfig, tyro.conf.arg(name="")] = _SAMPLING,
    step: int | None = None,
    ema_std: float | None = None,
    bank: Path | None = None,
    autoencoder: str | None = None,
    cache: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json: Path | None = None,
) -> None:
    """Measures runs, or samples, against real images.

    Of several targets, such as runs of several seeds, the spread is told too. Files of images are
    read in batches, and under torchrun the processes share them.

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
        step: Which checkpoint of a run; the newest by default.
        ema_std: Which average of its weights, as for  stratagem sample.
        bank: The memory bank of a run, if it has moved or was edited.
        autoencoder: Weights of the autoencoder of a run of latents, as for  stratagem sample.
        cache: Folder of the features of real images; REFERENCE.statistics by default.
        device: Where networks run; auto takes a GPU where there is one.
        json: Write the figures and the whole protocol to this file.
    """
    runs = [path for path in (*targets, reference) if (path / "config.yaml").is_file()]
    if not targets:
        raise InputError("name at least one run, folder of images, npz or data set")
    if not runs and (config != _SAMPLING or step or ema_std or bank or autoencoder):
        raise InputError("settings of sampling have no effect: there is no run to sample")
    with connect(device) as world:

        def model(run: Path) -> Model:
            opened = open_run(run, step=step, bank=bank, autoencoder=autoencoder, ema_std=ema_std)
            opened.denoiser.to(world.device)
            return opened

        images: Path | Source = reference
        if reference in runs:
            images = held(sample_run(model(reference), config).images, str(reference))
        kept = cache or reference.with_name(f"{reference.name}.statistics")
        real = Reference(images, features, measures, world=world, cache=kept)
        found = []
        for path in targets:
            with progress_bar("evaluate", "images") as progress:
                if path in runs:
                    one = evaluate_run(model(path), real, config, progress=progress)
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
        json.write_text(json_module.dumps(body, indent=1) + "\n")


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
        f"{m['held_out_median']:.4f}, copy rate {100 * m['copy_rate']:.1f} % (1 % is chance)"
    )
