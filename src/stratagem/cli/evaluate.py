"""`stratagem evaluate`."""

from __future__ import annotations

import dataclasses
import json as json_module
from pathlib import Path

from tyro.conf import Positional

from stratagem.assemble import open_run
from stratagem.cli.console import progress_bar, say
from stratagem.programs.evaluate import (
    Evaluation,
    FeatureName,
    Reference,
    evaluate_images,
    evaluate_run,
)
from stratagem.programs.sample import SampleConfig, load_images

__all__ = ["evaluate"]


def evaluate(
    target: Positional[Path],
    /,
    reference: Path,
    features: tuple[FeatureName, ...] = ("effnet",),
    weights: Path | None = None,
    num: int = 2000,
    steps: int = 50,
    seed: int = 0,
    step: int | None = None,
    bank: Path | None = None,
    allow_few: bool = False,
    json: Path | None = None,
) -> None:
    """Measures a run, or samples, against a data set.

    Example: stratagem evaluate runs/digits --reference out/digits --features pixels

    Args:
        target: A run, a folder of samples, or an npz in ADM's layout.
        reference: The data set.
        features: Feature nets: effnet, pixels (principal components), inception (a true FID).
        weights: The Inception-v3 weights file, for inception.
        num: Samples to make of a run.
        steps: Steps of the sampler, for a run.
        seed: Seed of the samples, for a run.
        step: Which checkpoint of a run; the newest by default.
        bank: The memory bank of a run, if it has moved or was edited.
        allow_few: Measure fewer images than the features have dimensions.
        json: Write the figures and the whole protocol to this file.
    """
    real = Reference(reference, features, weights)
    if (target / "config.yaml").is_file():
        model = open_run(target, step=step, bank=bank)
        cfg = SampleConfig(num=num, steps=steps, seed=seed)
        with progress_bar("sample", "images") as progress:
            found = evaluate_run(model, real, cfg, allow_few=allow_few, progress=progress)
    else:
        images = load_images(target, real.train.shape[1])
        found = evaluate_images(
            images, real, protocol={"samples": str(target)}, allow_few=allow_few
        )
    if json is not None:
        json.write_text(json_module.dumps(dataclasses.asdict(found), indent=1) + "\n")
    _print(found)


def _print(found: Evaluation) -> None:
    say(f"{found.num:,} samples against {found.protocol['reference_images']:,} training images")
    for name, value in found.distances.items():
        second = (found.held_out_snippets or {}).get(name)
        beside = "" if second is None else f"   with held-out snippets {second:.4f}"
        say(f"  {name:<12} {value:.4f}{beside}")
    if found.memorisation is None:
        say("  memorisation  not measured: the data set has no held-out images (prepare --holdout)")
        return
    m = found.memorisation
    say(
        f"  nearest training image at {m['median']:.4f}, of held-out real images at "
        f"{m['held_out_median']:.4f}, copy rate {100 * m['copy_rate']:.1f} % (1 % is chance)"
    )
