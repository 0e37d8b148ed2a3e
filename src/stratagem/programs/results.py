"""What reports show of a run; runs that differ in the seed alone become one, with bands.

    mean of the seeds    every figure
    least to greatest    the band of a distance

With few seeds the range says more honestly than a standard deviation how far they lie apart.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stratagem.assemble import make_schedule, open_run
from stratagem.config import RunConfig, dump
from stratagem.errors import InputError
from stratagem.memory.bank import MemoryBank
from stratagem.programs.cost import Cost, cost_of
from stratagem.programs.evaluate import Evaluation, load_all, load_preview
from stratagem.programs.sample import SampleConfig
from stratagem.programs.train_log import read_log
from stratagem.stages import Stages

__all__ = ["Agreement", "RunResult", "join_seeds", "read_run"]

Figures = Mapping[str, float]


class Agreement(NamedTuple):
    """How far the best denoisers of two noise levels agree, shape (T, T), and where it was cut."""

    matrix: Tensor
    edges: tuple[float, ...]


@dataclass(frozen=True)
class RunResult:
    """What the report shows of a run.

    Attributes:
        name: Its label.
        evaluations: By step; of several seeds their means.
        cost: Parameters and MACs.
        rate: Median training images per second; None of a run that was not trained here.
        preview: Samples of the last checkpoint, their neighbours and distances.
        setting: What it has in common with runs that differ in the seed alone; empty for nothing.
        bank: Its memory bank, or None.
        agreement: Of each two noise levels, and the times of its stages' edges; None if its stages
            were found in another way, or their file is gone.
        bands: By step, metric -> least and greatest over seeds; empty for one seed.
        seeds: How many seeds these are.
    """

    name: str
    evaluations: list[Evaluation]
    cost: Cost
    rate: float | None
    preview: dict[str, Tensor]
    setting: str = ""
    bank: MemoryBank | None = None
    agreement: Agreement | None = None
    bands: list[dict[str, tuple[float, float]]] = field(default_factory=list)
    seeds: int = 1

    @property
    def last(self) -> Evaluation:
        """The evaluation of the last checkpoint."""
        return self.evaluations[-1]


def read_run(name: str, path: Path) -> RunResult:
    """Reads a run's evaluations, cost and speed.

    Raises:
        InputError: If it is missing or not evaluated.
    """
    evaluations = load_all(path)
    model = open_run(path, step=evaluations[-1].step)
    rates = [line["images_per_second"] for line in read_log(path / "metrics.jsonl")]
    return RunResult(
        name,
        evaluations,
        cost_of(model, SampleConfig(**evaluations[-1].protocol["sampling"])),
        statistics.median(rates) if rates else None,
        load_preview(path, evaluations[-1].step),
        _setting(model.config),
        model.bank,
        _agreement(model.config),
    )


def join_seeds(results: Sequence[RunResult]) -> list[RunResult]:
    """Joins runs that differ in the seed alone, in the order of their first.

    Raises:
        InputError: If such runs have no evaluation after equally many images.
    """
    groups: dict[str, list[RunResult]] = {}
    for number, result in enumerate(results):
        groups.setdefault(result.setting or str(number), []).append(result)
    return [_joined(runs) if len(runs) > 1 else runs[0] for runs in groups.values()]


def _agreement(config: RunConfig) -> Agreement | None:
    file = config.stages.file if config.stages is not None else None
    if file is None or not Path(file).is_file():
        return None
    stages, record = Stages.load(Path(file))
    matrix = record.get("curves", {}).get("matrix")
    if matrix is None:
        return None
    return Agreement(torch.tensor(matrix), stages.times(make_schedule(record["schedule"])))


def _setting(config: RunConfig) -> str:
    train = dataclasses.replace(config.train, threads=0)  # these change no result, but its bits
    return dump(dataclasses.replace(config, seed=0, train=train))


def _joined(runs: Sequence[RunResult]) -> RunResult:
    common = set.intersection(*({e.images for e in r.evaluations} for r in runs))
    if not common:
        names = " and ".join(r.name for r in runs)
        raise InputError(
            f"{names} differ in the seed alone, but were never evaluated after equally many "
            "images: evaluate them at the same checkpoints"
        )
    rows = [[e for e in r.evaluations if e.images in common] for r in runs]
    columns = list(zip(*rows, strict=True))
    shared = _shared_beginning([r.name for r in runs]).rstrip("-_ .").removesuffix("seed")
    return dataclasses.replace(
        runs[0],
        name=f"{shared.rstrip('-_ .') or runs[0].name} ({len(runs)} seeds)",
        evaluations=[_mean_evaluation(column) for column in columns],
        rate=statistics.fmean(rates) if (rates := [r.rate for r in runs if r.rate]) else None,
        bands=[_band([e.distances for e in column]) for column in columns],
        seeds=len(runs),
    )


def _shared_beginning(names: Sequence[str]) -> str:
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in alike)


def _mean_evaluation(found: Sequence[Evaluation]) -> Evaluation:
    copying = [e.memorisation for e in found if e.memorisation is not None]
    memorisation = _mean(copying)
    if memorisation is not None:  # the most suspicious seed counts, as one of so many
        memorisation["p_value"] = min(1.0, len(copying) * min(m["p_value"] for m in copying))
    return dataclasses.replace(
        found[0],
        distances=_mean([e.distances for e in found]) or {},
        held_out_snippets=_mean([e.held_out_snippets for e in found if e.held_out_snippets]),
        memorisation=memorisation,
    )


def _band(rows: Sequence[Figures]) -> dict[str, tuple[float, float]]:
    values = {name: [row[name] for row in rows] for name in _common(rows)}
    return {name: (min(v), max(v)) for name, v in values.items()}


def _mean(rows: Sequence[Figures]) -> dict[str, float] | None:
    return {n: statistics.fmean(row[n] for row in rows) for n in _common(rows)} if rows else None


def _common(rows: Sequence[Figures]) -> list[str]:
    return [name for name in rows[0] if all(name in row for row in rows)]
