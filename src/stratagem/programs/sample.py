"""`stratagem sample`: images from a run.

    x_T ~ N(0, I)  ->  solver over `steps` intervals  ->  uint8 images

Image j is a function of the run, the settings and (seed, j): neither the batch size nor how many
are made nor by how many processes changes it, but for the rounding of sums. For a run with memory
the artifact says which snippet made which image.

`sample_into` survives being killed, and shares the work among processes that never wait for each
other:

    OUT.part/plan-R.json          what process R makes; two that differ are refused
    OUT.part/A-B.safetensors      images A to B - 1, each file whole or not there
    OUT                           put together by whoever finds every image there

Of W processes each makes a W-th of the batches, less the images already there. So the same command,
by any number of processes and with any batch size, goes on from what is there; if one process dies
the others finish their shares and end, and the next call makes what is missing. While the batch
size stays the same, so do the batches, and with them every bit.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratagem import artifact, randomness
from stratagem.assemble import Model
from stratagem.denoiser import Predictor
from stratagem.errors import InputError
from stratagem.guidance import ClassifierFree, Interval
from stratagem.programs import Progress, silent
from stratagem.programs.machine import tf32
from stratagem.programs.sample_files import KIND, Form, write_samples
from stratagem.programs.snippets import Choice, choose
from stratagem.programs.solvers import SampleConfig, SamplerName, make_solver
from stratagem.sampler import sample

__all__ = [
    "SampleConfig",
    "SamplerName",
    "Samples",
    "make_solver",
    "sample_into",
    "sample_run",
    "save_samples",
]

log = logging.getLogger(__name__)
_PART, _PLAN = "samples-part", "samples-plan"


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


class _Work:
    """What all images of a run have in common, made once."""

    def __init__(self, model: Model, cfg: SampleConfig) -> None:
        _check(model, cfg)
        self.model, self.cfg = model, cfg
        self.snippets = self.labels = None
        if model.bank is not None:
            self.snippets = choose(
                model.bank,
                cfg.num,
                cfg.snippets,
                seed=cfg.seed,
                label=cfg.label,
                like=cfg.like,
                weights=cfg.like_weights,
                noise=lambda rows: _start_noise(cfg, rows, model.shape),
            )
        if model.num_classes:
            self.labels = _labels(cfg, model.num_classes)
        self._solver, self._times = make_solver(cfg, model.denoiser.schedule)
        self._sigma = float(model.denoiser.schedule.sigma(self._times[0]))
        self._predictor = _guided(model, cfg)
        self._device = next(model.denoiser.parameters()).device

    @property
    def made_from(self) -> dict[str, Any]:
        """What made which image, JSON-able."""
        return _made_from(self.snippets, self.labels)

    def batches(self, rows: slice) -> Iterator[Tensor]:
        """Makes some images, in order; uint8 or latents, each (B, C, H, W), on the CPU."""
        for start in range(rows.start, rows.stop, self.cfg.batch_size):
            yield self._batch(slice(start, min(start + self.cfg.batch_size, rows.stop)))

    @tf32()
    def _batch(self, rows: slice) -> Tensor:
        model, condition = self.model, dict[str, Any]()
        if model.bank is not None and self.snippets is not None:
            condition["memory"] = self.snippets.memory(model.bank, rows).to(self._device)
        if self.labels is not None:
            condition["label"] = self.labels[rows].to(self._device)
        x_T = self._sigma * _start_noise(self.cfg, rows, model.shape).to(self._device)
        seeds = _seeds(self.cfg, rows)
        x = sample(self._predictor, self._solver, x_T, self._times, seeds=seeds, **condition)
        return model.finish(x).cpu()


def sample_run(model: Model, cfg: SampleConfig, *, progress: Progress = silent) -> Samples:
    """Samples images from a trained run, on the device of its network.

    Raises:
        InputError: If a setting is impossible or does not go with the run.
    """
    work, parts, done = _Work(model, cfg), list[Tensor](), 0
    for images in work.batches(slice(0, cfg.num)):
        parts.append(images)
        progress(done := done + len(images), cfg.num)
    return Samples(torch.cat(parts), work.snippets, work.labels)


def save_samples(samples: Samples, out: Path, meta: dict[str, Any], *, form: Form = "png") -> None:
    """Writes samples as numbered PNGs, or as one npz in ADM's layout (arr_0, uint8, N x H x W x 3).

    Raises:
        InputError: If `out` exists.
    """
    made = _made_from(samples.snippets, samples.labels)
    write_samples(out, [samples.images], tuple(samples.images.shape), made, meta, form)


def sample_into(
    model: Model,
    cfg: SampleConfig,
    out: Path,
    *,
    form: Form = "png",
    rank: int = 0,
    world: int = 1,
    progress: Progress = silent,
) -> int:
    """Samples images from a run into a folder; after a stop, the same call goes on.

    Args:
        model: The run.
        cfg: How to sample.
        out: The folder to make.
        form: Of images.
        rank: Which of the processes this is.
        world: How many processes share the work.
        progress: Called while sampling, with the images of this process.

    Returns:
        How many images are there. Once all are, `out` exists, unless another process is just
        putting it together.

    Raises:
        InputError: If a setting is impossible, or `out` or an unfinished call was made with others.
        DamagedArtifact: If a file of an unfinished call was altered.
    """
    meta, folder, there = _meta(model, cfg, form), out.parent / f"{out.name}.part", 0
    if not _is_done(out, meta):
        try:
            work = _Work(model, cfg)
            _join(folder, rank, meta)
            _make_share(work, folder, rank, world, progress)
            there = _finish(work, folder, out, meta, form)
        except FileNotFoundError:  # another process finished and took the parts away
            if not _is_done(out, meta):
                raise
    if not _is_done(out, meta):
        return there
    shutil.rmtree(folder, ignore_errors=True)
    return cfg.num


def _meta(model: Model, cfg: SampleConfig, form: Form) -> dict[str, Any]:
    """Says what decides the images, for the artifact and to know an unfinished call by."""
    sampling = dataclasses.asdict(cfg)
    del sampling["batch_size"]
    digest = hashlib.sha256()
    for name, tensor in model.denoiser.state_dict().items():
        digest.update(name.encode())
        digest.update(artifact.raw_bytes(tensor.flatten()[:256].cpu()))  # any training moves these
    return {
        "run": str(model.path),
        "step": model.step,
        "ema_std": model.ema_std,
        "weights": digest.hexdigest(),
        "bank": None if model.bank is None else model.bank.fingerprint,
        "autoencoder": model.finish.description(),
        "format": form,
        "sampling": sampling,
    }


def _is_done(out: Path, meta: dict[str, Any]) -> bool:
    """Whether these samples are there already; others in their place are an error."""
    if not out.exists():
        return False
    made = None
    if (out / artifact.MANIFEST).is_file():
        made = artifact.read_folder(out, KIND, verify=False).meta
    artifact.refuse_existing(out, replace=made == meta)
    return True


def _join(folder: Path, rank: int, meta: dict[str, Any]) -> None:
    """Enters an unfinished call, or begins one; each process leaves word of what it makes."""
    for plan in folder.glob("plan-*.json"):
        theirs = artifact.read_record(plan, _PLAN).meta
        if theirs != meta:
            ours, other = ({**m, **m["sampling"]} for m in (meta, theirs))
            names = ", ".join(n for n in ours if n != "sampling" and ours[n] != other.get(n))
            raise InputError(
                f"{folder} holds unfinished samples with other settings ({names}): finish them "
                "with the command that began them, or remove the folder"
            )
    artifact.write_record(folder / f"plan-{rank}.json", _PLAN, meta, replace=True)


def _make_share(work: _Work, folder: Path, rank: int, world: int, progress: Progress) -> None:
    """Makes what is missing of this process's images."""
    size, num = work.cfg.batch_size, math.ceil(work.cfg.num / work.cfg.batch_size)
    first, last = (num * number // world * size for number in (rank, rank + 1))
    share = slice(first, min(last, work.cfg.num))
    gaps = _gaps(folder, share)
    total = share.stop - share.start
    done = total - sum(gap.stop - gap.start for gap in gaps)
    for gap in gaps:
        at = gap.start
        for images in work.batches(gap):
            file = folder / f"{at:09d}-{at + len(images):09d}.safetensors"
            artifact.write_tensors(file, _PART, {"images": images}, {}, replace=True)
            at, done = at + len(images), done + len(images)
            progress(done, total)


def _finish(work: _Work, folder: Path, out: Path, meta: dict[str, Any], form: Form) -> int:
    """Puts the parts together if all are there; returns how many images are."""
    num = work.cfg.num
    missing = sum(gap.stop - gap.start for gap in _gaps(folder, slice(0, num)))
    if missing:
        return num - missing
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return num
        if not _is_done(out, meta):
            for orphan in out.parent.glob(f".{out.name}.*.tmp"):  # of a process killed right here
                shutil.rmtree(orphan)
            shape = (num, *work.model.finish.shape)
            write_samples(out, _in_order(folder), shape, work.made_from, meta, form)
    return num


def _parts(folder: Path) -> list[tuple[int, int, Path]]:
    """Lists the parts that are there: first image, last one + 1, file; in order."""
    files = ((file.stem.partition("-"), file) for file in folder.glob("*-*.safetensors"))
    return sorted((int(first), int(end), file) for (first, _, end), file in files)


def _gaps(folder: Path, rows: slice) -> list[slice]:
    """Returns which of some images are not there yet."""
    gaps, at = [], rows.start
    for first, end, _ in _parts(folder):
        gaps.append(slice(at, min(first, rows.stop)))
        at = max(at, end)
    gaps.append(slice(at, rows.stop))
    return [gap for gap in gaps if gap.start < gap.stop]


def _in_order(folder: Path) -> Iterator[Tensor]:
    """Yields all images, each once; calls by other numbers of processes may overlap."""
    at = 0
    for first, end, file in _parts(folder):
        if end > at:
            yield artifact.read_tensors(file, _PART)[0]["images"][at - first :]
            at = end


def _made_from(snippets: Choice | None, labels: Tensor | None) -> dict[str, Any]:
    return {
        "snippets": None if snippets is None else snippets.record(),
        "labels": None if labels is None else labels.tolist(),
    }


def _seeds(cfg: SampleConfig, rows: slice) -> list[int]:
    """Returns one number per image, different for every (seed, j)."""
    return [(cfg.seed << 40) + j for j in range(rows.start, rows.stop)]


def _start_noise(cfg: SampleConfig, rows: slice, shape: tuple[int, int, int]) -> Tensor:
    return randomness.normal_rows(_seeds(cfg, rows), shape, "start")


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
    near = cfg.like is not None or cfg.like_weights is not None
    if model.bank is None and (cfg.snippets != "train" or near):
        raise InputError("--snippets has no effect: this run was trained without memory")
    if cfg.label is not None and model.bank is None and not model.num_classes:
        raise InputError("--label has no effect: this run knows no classes")
    if cfg.label is not None and model.num_classes and not 0 <= cfg.label < model.num_classes:
        raise InputError(f"--label {cfg.label}: this run has classes 0 to {model.num_classes - 1}")
