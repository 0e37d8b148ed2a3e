"""`stratagem prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from stratagem.autoencoders import AutoencoderName, build_autoencoder
from stratagem.cli.console import progress_bar, say, say_json
from stratagem.data.datasets import Reading
from stratagem.data.datasets import prepare as prepare_data
from stratagem.data.disk import amount
from stratagem.data.latents import PosteriorKind
from stratagem.data.official import open_data, write_official
from stratagem.data.shards import DataSet
from stratagem.errors import InputError
from stratagem.programs import Device, device_of

__all__ = ["prepare"]

_PLAIN = (None, False, False, 0.0, "none", None, "mean+std", "auto", Reading())


def prepare(  # noqa: PLR0913, PLR0917
    images: Positional[str],
    /,
    out: Path,
    size: int | None = None,
    gray: bool = False,
    flip: bool = False,
    holdout: float = 0.0,
    seed: int = 0,
    from_: Annotated[Path | None, arg(name="from")] = None,
    workers: int | None = None,
    strict: bool = False,
    autoencoder: AutoencoderName | Literal["none"] = "none",
    weights: str | None = None,
    posterior: PosteriorKind = "mean+std",
    device: Device = "auto",
    layout: Literal["stratagem", "lightningdit"] = "stratagem",
    json: bool = False,
) -> None:
    """Makes a data set of images, wherever they lie; stopped, the same command goes on.

    Images are read from a folder, a zip or tar, a folder of tar shards as webdataset writes them,
    idx files, an npz file, or a data set of the Hugging Face hub. Labels are what lies beside an
    image (x.cls, x.json), the first sub-folder, or the labels of the arrays. What cannot be used is
    left out, counted, and named with its cause in rejected.json; docs/data.md has the cases.

    The names digits, fashion-mnist, emoji and cifar10 stand for real data sets. They are read from
    where their package puts them, or from --from, and found whole before anything is written.

    With an autoencoder it stores latents. A memory bank is still built of images: make a data set
    of images first, and the latents of that. Official latents, as LightningDiT and GMem keep them,
    can be trained on where they are; given as images, they become a data set of our own.

    Example: stratagem prepare photos/ --out out/photos --size 256 --flip --holdout 0.1
    Example: stratagem prepare shards/ --out out/imagenet --size 256 --workers 16
    Example: stratagem prepare fashion-mnist --out out/fashion
    Example: stratagem prepare out/photos --out out/latents --autoencoder va-vae --weights vavae.pt

    Args:
        images: What holds them, hf:NAME or hf:NAME:SPLIT, a name of those above, or a data set.
        out: The data set to make.
        size: Side of the square images in pixels; of arrays and named data their own, and else 32.
        gray: One channel instead of three; gray arrays have one anyway.
        flip: Training may use mirror images.
        holdout: Fraction of the images that training never sees, to measure memorisation with.
        seed: Seed of the choice of held-out images.
        from_: The folder or archive of a data set that goes by its name.
        workers: Processes that decode; as many as there are cores. The result is the same.
        strict: End at the first image that cannot be used.
        autoencoder: Store latents: sd-vae (4 channels, an 8th of the side), va-vae (32, a 16th).
        weights: Of the autoencoder: a folder, a file, or a repository of the Hugging Face hub; by
            default its authors' on the hub.
        posterior: What to keep of a latent; mean takes half the space and has no noise.
        device: Where the autoencoder runs; auto takes a GPU where there is one.
        layout: Write latents of a data set as LightningDiT reads them.
        json: Print what was made as JSON.
    """
    reading = Reading(from_, workers, strict)
    if layout != "stratagem":
        settings = (size, gray, flip, holdout, autoencoder, weights, posterior, device, reading)
        _export(Path(images), out, seed, plain=not json and settings == _PLAIN)
        return
    encoder = None
    if autoencoder != "none":
        encoder = build_autoencoder(autoencoder, weights, device_of(device))
    elif weights is not None or posterior != "mean+std" or device != "auto":
        raise InputError("--weights, --posterior and --device have no effect without --autoencoder")
    with progress_bar("prepare", "images") as progress:
        data = prepare_data(
            images,
            out,
            size=size,
            gray=gray,
            flip=flip,
            holdout=holdout,
            seed=seed,
            reading=reading,
            autoencoder=encoder,
            posterior=posterior,
            announce=None if json else lambda size: say(f"{out}: about {amount(size)} to write"),
            progress=progress,
        )
    causes: dict[str, list[str]] = {}
    for name, cause in data.rejected:
        causes.setdefault(cause, []).append(name)
    if json:
        say_json(_facts(data, causes))
    else:
        _report(data, causes)


def _facts(data: DataSet, causes: dict[str, list[str]]) -> dict[str, Any]:
    return {
        "data": str(data.path),
        "fingerprint": data.fingerprint,
        "kind": data.kind,
        "num": data.num,
        "shape": data.shape,
        "classes": data.classes,
        "held_out": len(data.held_out_indices),
        "left_out": {cause: len(names) for cause, names in causes.items()},
    }


def _report(data: DataSet, causes: dict[str, list[str]]) -> None:
    """Says what was made, and the ten most frequent causes of what was left out."""
    held, kind = len(data.held_out_indices), f"{data.kind} of {'x'.join(map(str, data.shape))}"
    say(f"{data.path}: {data.num:,} {kind}, {held:,} held out, {len(data.classes)} classes")
    for cause, names in sorted(causes.items(), key=lambda item: -len(item[1]))[:10]:
        more = f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""
        say(f"  left out {names[0]}{more}: {cause}")
    if num := len(data.rejected):
        files, read = f"{num:,} file{'s' * (num > 1)}", data.num + num
        say(f"  {files} left out of {read:,} that were read; all are in {data.path}/rejected.json")


def _export(images: Path, out: Path, seed: int, *, plain: bool) -> None:
    if not plain:
        raise InputError("with --layout, only --seed (of the draws) can be chosen: leave the rest")
    with progress_bar("prepare", "latents") as progress:
        write_official(open_data(images), out, seed=seed, progress=progress)
    say(f"{out}: latents as LightningDiT reads them, and their statistics")
