"""`stratagem audit`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from stratagem.cli.console import progress_bar, say, say_json
from stratagem.cli.opening import Opened, Opening
from stratagem.data.shards import DataSet
from stratagem.distributed import connect
from stratagem.encoders import EncoderName
from stratagem.errors import InputError
from stratagem.programs import Device
from stratagem.programs.audit import Audit, Judge
from stratagem.programs.audit_page import audit_page
from stratagem.programs.audited import audited_run, audited_samples
from stratagem.programs.reference import cache_beside
from stratagem.programs.sample import SampleConfig
from stratagem.report.page import save_page

__all__ = ["audit"]

_SAMPLING, _OPENING = SampleConfig(num=2000), Opening()


def audit(
    target: Positional[Path],
    /,
    data: Path,
    out: Path,
    features: tuple[EncoderName, ...] = ("effnet",),
    encoder_weights: str | None = None,
    config: Annotated[SampleConfig, tyro.conf.arg(name="")] = _SAMPLING,
    opening: Opened = _OPENING,
    cache: Path | None = None,
    device: Device = "auto",
    json: Path | None = None,
) -> None:
    """Says whether samples are copies of training images, and shows the closest pairs.

    Samples are compared with training images in pixels and in the vectors of frozen networks, and
    held-out real images, which no network has seen, are the yardstick. Of a data set that may be
    mirrored, a mirrored copy is a copy. A run with a memory is also sampled with held-out snippets,
    and several times with the same ones.

    Example: stratagem audit runs/digits --data out/digits --out audit.html
    Example: stratagem audit samples.npz --data out/photos --out audit.html --json audit.json
    --features effnet dinov2-b --encoder-weights facebook/dinov2-base

    Args:
        target: A run, a folder of images, or an npz in ADM's layout.
        data: The data set that the run was trained on, with held-out images.
        out: The HTML file; an older one is replaced.
        features: Networks whose vectors are compared beside pixels: effnet, or a DINO.
        encoder_weights: Weights of a DINO: a folder, or a repository of the hub.
        config: How a run is sampled; of a folder or npz, num is the most to take.
        opening: How a run is opened.
        cache: Folder of the statistics of real images; DATA.statistics by default.
        device: Where networks run; auto takes a GPU where there is one.
        json: Write the figures and the whole protocol to this file.
    """
    if config.num < 1:
        raise InputError(f"--num {config.num}: audit at least 1 sample")
    if not target.exists():
        raise InputError(f"nothing at {target}: give a run, a folder of images or an npz")
    run = (target / "config.yaml").is_file()
    usual = dataclasses.replace(config, num=_SAMPLING.num) == _SAMPLING
    if not run and not (usual and opening == _OPENING):
        raise InputError("settings of sampling have no effect: there is no run to sample")
    out.parent.mkdir(parents=True, exist_ok=True)
    with connect(device) as world:
        if world.size > 1:
            raise InputError("audit is one process: start it without torchrun")
        real = DataSet.open(data)
        judge = Judge(
            real,
            features,
            encoder_weights,
            device=world.device,
            scratch=out.parent,
            cache=cache or cache_beside(data),
        )
        if run:
            model = opening.model(target, world.device)
            judge.require(model.finish.shape)
            with progress_bar("sample", "images") as progress:
                audited = audited_run(model, real, config, progress=progress)
        else:
            audited = audited_samples(target, real, config.num)
        with progress_bar("compare", "images") as progress:
            found = judge.audit(audited, progress=progress)
    save_page(out, audit_page(found))
    if json is not None:
        say_json(found.record(), json)
    _print(found, out)


def _print(found: Audit, out: Path) -> None:
    say(found.verdict.sentence)
    for name, space in found.spaces.items():
        say(
            f"  {name:<8} copy rate {100 * space.copied.rate:.1f} %   distance ratio "
            f"{space.ratio:.2f}   C_T {space.score:.1f}   AuthPct {100 * space.authentic:.0f} %"
        )
    say(f"the report is {out.resolve()}")
