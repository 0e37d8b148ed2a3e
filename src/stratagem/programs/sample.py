"""`stratagem sample`: images from a run.

    x_T ~ N(0, I)  ->  solver over `steps` intervals  ->  uint8 images

Image j is a function of the run, the settings and (seed, j): neither the batch size nor how many
are made changes it, but for the rounding of sums. For a run with memory the artifact says which
snippet made which image.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stratagem import artifact, randomness
from stratagem.assemble import Model
from stratagem.data.images import to_uint8
from stratagem.denoiser import Predictor
from stratagem.errors import InputError
from stratagem.grid import time_grid
from stratagem.guidance import ClassifierFree, Interval
from stratagem.programs import Progress, silent
from stratagem.programs.snippets import Choice, SnippetPolicy, choose
from stratagem.sampler import (
    DDIM,
    DPMSolver2M,
    Euler,
    EulerMaruyama,
    Heun,
    Sampler,
    StochasticHeun,
    sample,
)
from stratagem.schedule import EDM, NoiseSchedule

__all__ = ["SampleConfig", "Samples", "load_images", "make_solver", "sample_run", "save_samples"]

log = logging.getLogger(__name__)
KIND = "samples"


SamplerName = Literal["euler", "ddim", "heun", "dpm++2m", "euler-maruyama", "heun-sde"]


@dataclass(frozen=True)
class SampleConfig:
    """How to sample.

    Attributes:
        num: How many images.
        seed: Seed of noise and snippets.
        sampler: The solver; euler-maruyama and heun-sde draw noise on the way, with w(t) = sigma_t.
        steps: Intervals of the time grid.
        shift: Above 1 puts more steps near the noise; LightningDiT's and GMem's k is 1 / k here.
        last_step: Size of the last step, to no noise; 0 for one as long as the others.
        guidance: Strength of classifier-free guidance; 1 for none.
        guide_from: Smallest guided time.
        guide_to: Largest guided time; GMem's interval start s is 1 - s here.
        snippets: Which rows of the bank, see `programs.snippets`; only for a run with memory.
        like: An image or a folder of them, for snippets near.
        label: The class: of the snippets with "label", or of a run conditioned on classes.
        batch_size: Images sampled at once.
    """

    num: int = 64
    seed: int = 0
    sampler: SamplerName = "heun"
    steps: int = 50
    shift: float = 1.0
    last_step: float = 0.0
    guidance: float = 1.0
    guide_from: float = 0.0
    guide_to: float = 1.0
    snippets: SnippetPolicy = "train"
    like: str | None = None
    label: int | None = None
    batch_size: int = 256


@dataclass(frozen=True)
class Samples:
    """Sampled images and where they come from.

    Attributes:
        images: uint8, (N, C, H, W); of a network of latents, float32.
        snippets: The snippets behind the images, or None.
        labels: Class behind each image, (N,), or None.
    """

    images: Tensor
    snippets: Choice | None
    labels: Tensor | None


def sample_run(model: Model, cfg: SampleConfig, *, progress: Progress = silent) -> Samples:
    """Samples images from a trained run.

    Raises:
        InputError: If a setting is impossible or does not go with the run.
    """
    _check(model, cfg)
    snippets = labels = None
    if model.bank is not None:
        snippets = choose(
            model.bank,
            cfg.num,
            cfg.snippets,
            seed=cfg.seed,
            label=cfg.label,
            like=cfg.like,
            noise=lambda rows: _start_noise(cfg, rows, model.shape),
        )
    if model.num_classes:
        labels = _labels(cfg, model.num_classes)
    solver, times = make_solver(cfg, model.denoiser.schedule)
    sigma = float(model.denoiser.schedule.sigma(times[0]))
    predictor = _guided(model, cfg)
    latent = model.shape[0] not in (1, 3)
    images = torch.empty((cfg.num, *model.shape), dtype=torch.float32 if latent else torch.uint8)
    for start in range(0, cfg.num, cfg.batch_size):
        rows = slice(start, min(start + cfg.batch_size, cfg.num))
        condition: dict[str, Any] = {}
        if model.bank is not None and snippets is not None:
            condition["memory"] = snippets.memory(model.bank, rows)
        if labels is not None:
            condition["label"] = labels[rows]
        x_T = sigma * _start_noise(cfg, rows, model.shape)
        x = sample(predictor, solver, x_T, times, seeds=_seeds(cfg, rows), **condition)
        images[rows] = x if latent else to_uint8(x)
        progress(rows.stop, cfg.num)
    return Samples(images, snippets, labels)


def save_samples(
    samples: Samples, out: Path, meta: dict[str, Any], *, form: Literal["png", "npz"] = "png"
) -> None:
    """Writes samples as numbered PNGs, or as one npz in ADM's layout (arr_0, uint8, N x H x W x 3).

    Latents, which only their autoencoder can make images of, go to latents.safetensors.

    Raises:
        InputError: If `out` exists.
    """
    with artifact.write_folder(out, KIND, meta) as folder:
        pictures = samples.images.permute(0, 2, 3, 1).numpy()
        if samples.images.is_floating_point():
            artifact.write_tensor_file(folder / "latents.safetensors", {"latents": samples.images})
        elif form == "npz":
            np.savez(folder / "samples.npz", arr_0=np.repeat(pictures, 3 // pictures.shape[-1], -1))
        else:
            for number, picture in enumerate(pictures):
                flat = picture[..., 0] if picture.shape[-1] == 1 else picture
                Image.fromarray(flat).save(folder / f"{number:06d}.png")
        made = {
            "snippets": samples.snippets.record() if samples.snippets is not None else None,
            "labels": samples.labels.tolist() if samples.labels is not None else None,
        }
        (folder / "made_from.json").write_text(json.dumps(made))


def load_images(path: Path, channels: int) -> Tensor:
    """Reads the images of a samples artifact, a folder of PNGs or an ADM npz, uint8 (N, C, H, W).

    Args:
        path: Folder or npz file.
        channels: 1 or 3, those of the images to compare with.

    Raises:
        InputError: If there are no images, or of several sizes.
    """
    if path.is_dir() and (path / artifact.MANIFEST).is_file():
        artifact.read_folder(path, KIND)
    files = [path] if path.suffix == ".npz" else sorted(path.glob("*.npz"))
    if files:
        return _from_npz(files[0], channels)
    names = sorted(path.glob("*.png"))
    if not names:
        raise InputError(f"{path} holds no samples: expected PNG files or an npz with arr_0")
    mode = "L" if channels == 1 else "RGB"
    arrays = [np.array(Image.open(name).convert(mode)) for name in names]
    if len({a.shape for a in arrays}) > 1:
        raise InputError(f"the images in {path} have several sizes: use images of one size")
    stack = torch.from_numpy(np.stack(arrays))
    return stack[:, None] if channels == 1 else stack.permute(0, 3, 1, 2).contiguous()


def _from_npz(path: Path, channels: int) -> Tensor:
    try:
        pictures = np.load(path)["arr_0"]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} is no npz of images with arr_0: {error}") from error
    if pictures.ndim != 4 or pictures.dtype != np.uint8 or pictures.shape[-1] != 3:
        raise InputError(f"{path}: arr_0 is {pictures.dtype} {pictures.shape}, not uint8 N,H,W,3")
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)[:, :channels].contiguous()


def make_solver(cfg: SampleConfig, schedule: NoiseSchedule) -> tuple[Sampler, Tensor]:
    """Returns the solver and its time grid: EDM's own for its schedule, else even or shifted.

    Raises:
        InputError: If the solver does not go with the schedule.
    """
    edm, grid = isinstance(schedule, EDM), _grid(cfg, schedule)
    match cfg.sampler:
        case "euler":
            return Euler(), grid
        case "ddim":
            return DDIM(), grid
        case "heun":
            return Heun("sigma" if edm else "time"), grid
        case "dpm++2m":
            return DPMSolver2M(), grid
        case "euler-maruyama" if not edm:
            return EulerMaruyama(), grid
        case "heun-sde" if not edm:
            return StochasticHeun(), grid
    raise InputError(f"--sampler {cfg.sampler} does not go with schedule edm: choose heun")


def _seeds(cfg: SampleConfig, rows: slice) -> list[int]:
    """Returns one number per image, different for every (seed, j)."""
    return [(cfg.seed << 40) + j for j in range(rows.start, rows.stop)]


def _start_noise(cfg: SampleConfig, rows: slice, shape: tuple[int, int, int]) -> Tensor:
    return randomness.normal_rows(_seeds(cfg, rows), shape, "start")


def _grid(cfg: SampleConfig, schedule: NoiseSchedule) -> Tensor:
    if isinstance(schedule, EDM):
        if cfg.shift != 1 or cfg.last_step:
            raise InputError("--shift and --last-step have no effect on schedule edm's own grid")
        return time_grid(cfg.steps, "karras", schedule=schedule)
    if cfg.shift != 1 and cfg.last_step:
        raise InputError("--shift and --last-step do not go together: give one")
    if cfg.shift != 1:
        return time_grid(cfg.steps, "shifted", shift=cfg.shift)
    return time_grid(cfg.steps, last_step=cfg.last_step) if cfg.last_step else time_grid(cfg.steps)


def _guided(model: Model, cfg: SampleConfig) -> Predictor:
    """Wraps the denoiser by guidance, if there is any."""
    if cfg.guidance == 1:
        if (cfg.guide_from, cfg.guide_to) != (0.0, 1.0):
            raise InputError("--guide-from and --guide-to have no effect without --guidance")
        return model.denoiser
    if model.bank is None and not model.num_classes:
        raise InputError("--guidance has no effect: this run has neither memory nor classes")
    if not model.config.train.condition_dropout:
        log.warning(
            "the run was trained without train.condition_dropout, so what guidance leads away from "
            "was never learned"
        )
    guided = ClassifierFree(model.denoiser, cfg.guidance, null_label=model.num_classes)
    return Interval(guided, cfg.guide_from, cfg.guide_to)


def _labels(cfg: SampleConfig, num_classes: int) -> Tensor:
    if cfg.label is not None:
        return torch.full((cfg.num,), cfg.label)
    draws = randomness.generator(cfg.seed, "label").random(cfg.num)
    return torch.from_numpy((draws * num_classes).astype("int64"))


def _check(model: Model, cfg: SampleConfig) -> None:
    if cfg.num < 1 or cfg.steps < 1 or cfg.batch_size < 1:
        raise InputError("--num, --steps and --batch-size must be at least 1")
    if model.bank is None and (cfg.snippets != "train" or cfg.like is not None):
        raise InputError("--snippets has no effect: this run was trained without memory")
    if cfg.label is not None and model.bank is None and not model.num_classes:
        raise InputError("--label has no effect: this run knows no classes")
    if cfg.label is not None and model.num_classes and not 0 <= cfg.label < model.num_classes:
        raise InputError(f"--label {cfg.label}: this run has classes 0 to {model.num_classes - 1}")
