"""`stratagem bench`: speed, measured here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, UseAppendAction

from stratagem.cli.console import progress_bar, say, say_json
from stratagem.config import load
from stratagem.errors import InputError
from stratagem.programs.bench import SampleSpeed, Speed, bench_sample, bench_train
from stratagem.programs.blank import Blank
from stratagem.programs.sample import SampleConfig, SamplerName

__all__ = ["sample", "train"]

_Settings = Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")]
_Sizes = Annotated[Blank, tyro.conf.arg(name="")]


def train(
    configs: Positional[tuple[Path, ...]],
    /,
    set: _Settings = (),  # noqa: A002
    sizes: _Sizes = Blank(),  # noqa: B008 (frozen)
    seconds: float = 20.0,
    json: bool = False,
) -> None:
    """Measures how fast configurations train here: images/s, MFU, memory, where the time goes.

    Data and bank of a configuration need not be there: noise of the sizes given stands for them.
    Nothing is written, and nothing is kept.

    Example: stratagem bench train digits.yaml
    Example: stratagem bench train gmem-xl-sde.yaml --shape 32 16 16 --set train.batch_size=256
        --set train.precision=bf16 --set train.compile=true

    Args:
        configs: YAML files, one after another.
        set: Overrides of them, section.key=value.
        sizes: Of what is not there.
        seconds: About how long to measure each.
        json: Print JSON.
    """
    found = {}
    for path in _some(configs):
        with progress_bar(f"bench {path.name}", "turns") as progress:
            found[str(path)] = speed = bench_train(
                load(path, set), sizes, seconds=seconds, progress=progress
            )
        if not json:
            say("\n".join(_training(path, speed)))
    if json:
        say_json({name: dataclasses.asdict(s) for name, s in found.items()})


def sample(
    configs: Positional[tuple[Path, ...]],
    /,
    set: _Settings = (),  # noqa: A002
    sizes: _Sizes = Blank(),  # noqa: B008 (frozen)
    sampler: SamplerName = "heun",
    steps: int = 50,
    batch_size: int = 64,
    seconds: float = 20.0,
    json: bool = False,
) -> None:
    """Measures how fast networks of configurations sample here; they need not be trained.

    Example: stratagem bench sample digits.yaml --sampler dpm++2m --steps 10

    Args:
        configs: YAML files, one after another.
        set: Overrides of them, section.key=value.
        sizes: Of what is not there.
        sampler: The solver.
        steps: Its steps.
        batch_size: Images at once.
        seconds: About how long to measure each.
        json: Print JSON.
    """
    how, found = SampleConfig(sampler=sampler, steps=steps, batch_size=batch_size), {}
    for path in _some(configs):
        with progress_bar(f"bench {path.name}", "batches") as progress:
            found[str(path)] = speed = bench_sample(
                load(path, set), how, sizes, seconds=seconds, progress=progress
            )
        if not json:
            say("\n".join(_sampling(path, speed)))
    if json:
        say_json({name: dataclasses.asdict(s) for name, s in found.items()})


def _some(configs: tuple[Path, ...]) -> tuple[Path, ...]:
    if not configs:
        raise InputError("bench needs a configuration: give one or more YAML files")
    return configs


def _training(path: Path, s: Speed) -> list[str]:
    parts = ", ".join(f"{name} {s.milliseconds[name]:,.4g}" for name in _ORDER)
    used = f"MFU {s.mfu:.1%} of {s.peak / 1e12:,.3g} TFLOP/s, measured"
    if s.sheet is not None:
        used += f"; {s.sheet_mfu:.1%} of {s.sheet / 1e12:,.3g}, the data sheet's"
    return [
        f"{path}: {s.device}, {s.precision}, batches of {s.batch_size}, "
        f"{s.parameters / 1e6:,.2f} M parameters, {s.macs / 1e9:,.4g} G MACs of an image, forward",
        f"  {s.images_per_second:,.4g} images/s, {s.ratio:.1%} of the "
        f"{s.bare_images_per_second:,.4g} of bare forward, backward and AdamW",
        f"  {used}; at most {s.peak_bytes / 2**30:,.3g} GiB",
        f"  ms of a step: {parts}; beside it: data {s.milliseconds['data']:,.4g}",
    ]


_ORDER = ("forward", "backward", "optimizer", "clip", "ema", "rest")


def _sampling(path: Path, s: SampleSpeed) -> list[str]:
    return [
        f"{path}: {s.device}, float32, {s.batch_size} images at once, {s.calls} calls each",
        f"  {s.images_per_second:,.4g} images/s, {s.network_share:.1%} of the time in the network",
        f"  MFU {s.mfu:.1%} of {s.peak / 1e12:,.3g} TFLOP/s, measured; at most "
        f"{s.peak_bytes / 2**30:,.3g} GiB",
    ]
