"""`stratagem stages`: where to cut the noise axis of a data set.

    optimal-denoiser, dp   images -> optimal denoiser -> agreement of noise levels -> edges
    gradient               a trained run -> gradients -> their cosines             -> edges

With a memory bank the optimal denoiser is told the image's snippet, as a memory network is; the
search without snippets, over the same draws, stands beside it. The record says which data, bank or
run were looked at and how, and what share of training draws and sampler calls each stage gets.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stratagem.artifact import refuse_existing
from stratagem.assemble import Model, make_density, make_schedule, open_run
from stratagem.batches import Batches, Conditions, Snippets
from stratagem.clustering.affinity import gradient_affinity
from stratagem.clustering.optimal_denoiser import OptimalDenoiser
from stratagem.clustering.search import (
    Axis,
    Method,
    StageSearch,
    check_search,
    find_stages,
    share_of_draws,
)
from stratagem.clustering.similarity import Similarity, similarity
from stratagem.config import DiffusionConfig
from stratagem.data.official import open_data
from stratagem.data.shards import DataSet
from stratagem.errors import InputError
from stratagem.memory.bank import MemoryBank
from stratagem.objective import Objective
from stratagem.programs import Device, Progress, device_of, part_of, silent
from stratagem.programs.cost import call_times
from stratagem.programs.sample import SampleConfig
from stratagem.programs.stages_page import stages_page
from stratagem.randomness import permutation
from stratagem.report.page import save_page
from stratagem.schedule import NoiseSchedule
from stratagem.stages import Stages

__all__ = ["StageConfig", "stages"]

_GRADIENT_BATCH = 64
_UNIT = {"eps": "1/255 of the noise's standard deviation", "x": "1/255 of the data's range"}


@dataclass(frozen=True)
class StageConfig:
    """How to look for stages; each setting goes with some of the methods.

    Attributes:
        schedule: The noise schedule whose times are searched; method gradient takes the run's.
        density: Where training draws t: "uniform", "logit-normal", or "log-normal" in sigma/alpha.
        density_mean: Mean of the normal inside the density.
        density_std: Its standard deviation.
        space: What has to agree: noise estimates ("eps", the paper) or images ("x").
        eta: Largest difference that counts as agreement, in 1/255 of the noise's standard deviation
            (space eps) or of the data's range (space x).
        alpha: Least mean agreement of an end stage with its end (method optimal-denoiser).
        min_mass: Least share of the training draws in a stage (method dp).
        times: Number of noise levels looked at.
        samples: Number of (image, noise) draws.
        images: Look at so many training images, drawn at random; absent: all.
        memory: A bank of the data: the stages of a network that is told an image's snippet.
        temperature: Of the kernel exp(cosine / temperature) by which images weigh (with memory);
            absent: such that snippets are told apart as well as under a dropout of 0.4.
        tolerance: Share of the images' weight that may be left out, which saves time.
        run: A run on the data, trained without stages (method gradient).
        device: Where to compute.
    """

    schedule: Literal["linear", "cosine", "vp", "edm"] = "linear"
    density: Literal["uniform", "logit-normal", "log-normal"] = "logit-normal"
    density_mean: float = 0.0
    density_std: float = 1.0
    space: Literal["eps", "x"] = "eps"
    eta: float = 2.0
    alpha: float = 0.9
    min_mass: float = 0.05
    times: int = 100
    samples: int = 256
    images: int | None = None
    memory: Path | None = None
    temperature: float | None = None
    tolerance: float = 0.0
    run: Path | None = None
    device: Device = "cpu"


_AXIS = {"schedule", "density", "density_mean", "density_std"}
_AGREEMENT = _AXIS | {
    *("space", "eta", "times", "samples", "images", "memory", "temperature", "tolerance", "device"),
}
_EFFECT: dict[Method | None, set[str]] = {
    None: _AGREEMENT | {"alpha", "min_mass"},
    "optimal-denoiser": _AGREEMENT | {"alpha"},
    "dp": _AGREEMENT | {"min_mass"},
    "gradient": {"run", "times", "samples", "device"},
    "snr": _AXIS | {"times"},
    "uniform": _AXIS,
}


def stages(
    data: Path,
    out: Path,
    *,
    num: int = 3,
    method: Method | None = None,
    seed: int = 0,
    config: StageConfig = StageConfig(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Finds the stages of a data set's training images, saves them, and a page that shows them.

    Args:
        data: The data set artifact.
        out: The JSON file to write; the page has its name with .html.
        num: How many stages.
        method: How to find them, see `clustering.search`; by default "optimal-denoiser", or "dp" of
            the same curves where they have no thresholds.
        seed: Seed of all draws.
        config: All else.
        progress: Called with the work done and in all.

    Returns:
        All that the file says of the stages and how they were found.

    Raises:
        InputError: If an artifact is missing or of other data, `out` exists, a setting is out of
            range or has no effect, or the method cannot make so many stages.
    """
    refuse_existing(out, replace=False)
    page = out.with_suffix(".html")
    if out == page:
        raise InputError(f"--out {out}: name a JSON file; the page takes its name with .html")
    refuse_existing(page, replace=False)
    _check(config, method)
    images = open_data(data)
    model = _trained(config.run, images) if config.run is not None else None
    diffusion = _diffusion(config, model)
    schedule = make_schedule(diffusion.schedule)
    axis = Axis(schedule, make_density(diffusion, schedule), config.times)
    check_search(axis, num, method or "dp", alpha=config.alpha, min_mass=config.min_mass)
    job = _Job(config, images, axis, num, method, seed, progress)
    search, without = job.by_gradient(model) if model is not None else job.by_data()
    record = _record(search, without, axis, images) | {"schedule": diffusion.schedule}
    search.stages.save(out, record)
    save_page(page, stages_page(record))
    return record


@dataclass(frozen=True)
class _Job:
    """One search: what is looked at, and how."""

    config: StageConfig
    data: DataSet
    axis: Axis
    num: int
    method: Method | None
    seed: int
    progress: Progress

    def by_data(self) -> tuple[StageSearch, StageSearch | None]:
        """Searches with what the data tell, with and without snippets where there is a bank."""
        cfg = self.config
        if self.method in {"snr", "uniform"}:
            return self._find(None, {}), None
        index = _chosen(self.data, cfg.images, self.seed)
        points, low, high = _points(self.data, index)
        denoiser = self._denoiser(points)
        known: dict[str, Any] = {
            **{"space": cfg.space, "eta": cfg.eta},
            "eta_unit": _UNIT[cfg.space],
            "range": [low, high],
            "num_images": len(points),
            "num_samples": cfg.samples,
            "seed": self.seed,
        }
        known |= {"tolerance": cfg.tolerance} if cfg.tolerance else {}
        if cfg.memory is None:
            return self._find(self._curves(denoiser, high - low, 0, 1), known), None
        told = self._denoiser(points, _memory(cfg.memory, self.data, index))
        assert told.kernel is not None
        heat = told.kernel.temperature
        without = self._curves(denoiser, high - low, 0, 2)
        curves = self._curves(told, high - low, 1, 2)
        told_of = known | {"memory": str(cfg.memory), "temperature": heat}
        try:
            found = self._find(curves, told_of)
        except InputError as error:
            raise InputError(f"with snippets at temperature {heat:.3g}: {error}") from None
        return found, dataclasses.replace(self, method=found.method)._find(without, known)

    def by_gradient(self, model: Model) -> tuple[StageSearch, None]:
        """Searches with the gradients of a trained network."""
        cfg, device = self.config, torch.device(device_of(self.config.device))
        size = min(_GRADIENT_BATCH, cfg.samples)
        num = -(-cfg.samples // size)
        snippets = None if model.bank is None else Snippets(model.bank)
        told = Conditions(snippets, model.num_classes)
        draw = Batches(self.data, self.axis.density, size, self.seed, told)
        batches = [draw(number) for number in range(num)]
        objective = Objective(model.denoiser).to(device)
        parameters = list(model.denoiser.requires_grad_(True).parameters())

        def loss(k: int, b: int) -> Tensor:
            x, eps = batches[b].x.to(device), batches[b].eps.to(device)
            t = self.axis.times[k].to(x).expand(len(x))
            told = {name: value.to(device) for name, value in batches[b].condition.items()}
            return objective(x, eps, t, **told).denoise.mean()

        affinity = gradient_affinity(
            loss, parameters, self.axis.num_times, num, seed=self.seed, progress=self.progress
        )
        known = {"run": str(model.path), "step": model.step, "num_samples": num * size}
        return self._find(affinity, {**known, "seed": self.seed}), None

    def _denoiser(self, points: Tensor, memory: Tensor | None = None) -> OptimalDenoiser:
        cfg = self.config
        return OptimalDenoiser(
            points,
            self.axis.schedule,
            memory=memory,
            temperature=None if memory is None else cfg.temperature,
            device=torch.device(device_of(cfg.device)),
            tolerance=cfg.tolerance,
        )

    def _find(self, evidence: Similarity | Tensor | None, known: dict[str, Any]) -> StageSearch:
        cfg = self.config
        if self.method is None:
            try:
                return dataclasses.replace(self, method="optimal-denoiser")._find(evidence, known)
            except InputError as error:
                return dataclasses.replace(self, method="dp")._find(
                    evidence, known | {"thresholds": str(error)}
                )
        found = find_stages(
            self.axis, self.num, self.method, evidence, alpha=cfg.alpha, min_mass=cfg.min_mass
        )
        return dataclasses.replace(found, parameters=found.parameters | known)

    def _curves(
        self, denoiser: OptimalDenoiser, data_range: float, part: int, parts: int
    ) -> Similarity:
        """Measures agreement; the progress is that of part `part` of `parts`."""
        cfg = self.config
        return similarity(
            denoiser,
            self.axis.times,
            num_samples=cfg.samples,
            eta=cfg.eta / 255,
            seed=self.seed,
            space=cfg.space,
            data_range=data_range if cfg.space == "x" else None,
            progress=part_of(self.progress, part, parts),
        )


def _points(data: DataSet, index: Tensor) -> tuple[Tensor, float, float]:
    """Returns what the optimal denoiser sees of the images `index`, and the ends of its range."""
    if data.kind == "images":
        return data.images(index), -1.0, 1.0  # uint8 pixels stand for [-1, 1]
    shape = (len(index), *data.shape)
    unflipped = torch.zeros(len(index), dtype=torch.bool)
    x = data.sample(index, unflipped, lambda: torch.zeros(shape))  # the posterior's mean
    return x, float(x.min()), float(x.max())


def _chosen(data: DataSet, num: int | None, seed: int) -> Tensor:
    """Returns the training images to look at, increasing."""
    index = data.train_indices
    if num is not None and not 2 <= num <= len(index):
        raise InputError(
            f"--images {num}: {data.path} has {len(index)} training images, give 2 to {len(index)}"
        )
    if len(index) < 2:
        raise InputError(
            f"{data.path} has {len(index)} training image: stages need at least 2, better 1,000"
        )
    if num is None:
        return index
    return index[permutation(len(index), seed, "stages images")[:num]].sort().values


def _memory(path: Path, data: DataSet, index: Tensor) -> Tensor:
    bank = MemoryBank.load(path)
    bank.check(data.origin)
    return bank.lookup(index)


def _trained(path: Path, data: DataSet) -> Model:
    model = open_run(path)
    if model.data != data.fingerprint:
        raise InputError(f"{path} was trained on other data than {data.path}: give its own data")
    if model.denoiser.stages is not None:
        raise InputError(
            f"{path} has stages: different decoders share few gradients, so that the edges it was "
            "trained with would be found again; give a run without stages"
        )
    return model


def _diffusion(cfg: StageConfig, model: Model | None) -> DiffusionConfig:
    if model is not None:
        return model.config.diffusion
    return DiffusionConfig(
        schedule=cfg.schedule,
        density=cfg.density,
        density_mean=cfg.density_mean,
        density_std=cfg.density_std,
    )


def _record(
    search: StageSearch, without: StageSearch | None, axis: Axis, data: DataSet
) -> dict[str, Any]:
    """Returns all that is known of a search, JSON-able."""
    cfg, parts, schedule = SampleConfig(), search.stages, axis.schedule
    times = torch.tensor(call_times(cfg, schedule), dtype=torch.float64)
    calls = torch.bincount(parts.index(schedule.log_snr(times)), minlength=parts.num)
    record = {
        **search.record(),
        "data": data.fingerprint,
        "edges": _edges(parts, schedule),
        "share_of_draws": list(share_of_draws(parts, axis.density, schedule)),
        "share_of_calls": (calls.double() / len(times)).tolist(),
        "sampler": f"{cfg.sampler}, {cfg.steps} steps",
    }
    if without is not None:
        record["without_memory"] = without.record() | {"edges": _edges(without.stages, schedule)}
    return record


def _edges(parts: Stages, schedule: NoiseSchedule) -> list[dict[str, float]]:
    return [
        {"log_snr": edge, "sigma_over_alpha": math.exp(-edge / 2), "t": t}
        for edge, t in zip(parts.edges, parts.times(schedule), strict=True)
    ]


def _check(cfg: StageConfig, method: Method | None) -> None:
    """Refuses settings that are out of range or have no effect."""
    if method not in _EFFECT:
        raise InputError(f"no method {method!r}: choose one of {', '.join(get_args(Method))}")
    for field in dataclasses.fields(cfg):
        if getattr(cfg, field.name) != field.default and field.name not in _EFFECT[method]:
            where = "the run says it" if field.name in _AXIS else "leave it out"
            name = field.name.replace("_", "-")
            by = "the default method" if method is None else f"method {method}"
            raise InputError(f"--{name} has no effect on {by}: {where}")
    if cfg.density == "uniform" and (cfg.density_mean, cfg.density_std) != (0.0, 1.0):
        raise InputError("--density-mean and --density-std have no effect on density uniform")
    if cfg.memory is None and cfg.temperature is not None:
        raise InputError("--temperature has no effect without --memory")
    if method == "gradient" and cfg.run is None:
        raise InputError("method gradient looks at a trained network: name one with --run")
    if not cfg.eta > 0:
        raise InputError(f"--eta {cfg.eta:g}: give a number above 0")
    if cfg.samples < 2:
        raise InputError(f"--samples {cfg.samples}: ask for at least 2, better 100 or more")
