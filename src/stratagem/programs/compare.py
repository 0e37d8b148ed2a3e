"""`stratagem compare`: evaluated runs into one page that opens offline.

    curves   Frechet distance against training images seen
    table    distance, cost and memorisation of the last checkpoint of each run
    grids    samples above their nearest training images

The first run is the baseline: the page says after how many images the others reach its last figure.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from stratagem.assemble import open_run
from stratagem.errors import InputError
from stratagem.metrics.memorisation import LEVEL
from stratagem.programs.cost import Cost, cost_of
from stratagem.programs.evaluate import Evaluation, load_all, load_preview
from stratagem.programs.sample import SampleConfig
from stratagem.report.charts import Series, line_chart
from stratagem.report.page import Section, neighbour_grid, page, save_page, table

__all__ = ["RunResult", "compare", "copies", "images_to_reach", "read_run", "result_sections"]

_SHOWN = 20


@dataclass(frozen=True)
class RunResult:
    """What the report shows of a run.

    Attributes:
        name: Its label.
        evaluations: By step.
        cost: Parameters and MACs.
        rate: Median training images per second.
        preview: Samples of the last checkpoint, their neighbours and distances.
    """

    name: str
    evaluations: list[Evaluation]
    cost: Cost
    rate: float
    preview: dict[str, Tensor]

    @property
    def last(self) -> Evaluation:
        """The evaluation of the last checkpoint."""
        return self.evaluations[-1]


def compare(runs: Sequence[Path], out: Path) -> str:
    """Writes the report of evaluated runs and returns the sentence on who is faster.

    Args:
        runs: Run folders; the first is the baseline.
        out: The HTML file to write; an older one is replaced.

    Raises:
        InputError: If a run is missing or not evaluated, or evaluations differ in protocol.
    """
    if len({run.name for run in runs}) < len(runs):
        raise InputError("two runs have the same name: rename a folder")
    results = [read_run(run.name, run) for run in runs]
    sections = result_sections(results)
    lead = speed_sentence(results)
    save_page(out, page("Comparison of runs", lead, sections, "Made by stratagem compare."))
    return lead


def read_run(name: str, path: Path) -> RunResult:
    """Reads a run's evaluations, cost and speed.

    Raises:
        InputError: If it is missing or not evaluated.
    """
    evaluations = load_all(path)
    model = open_run(path, step=evaluations[-1].step)
    rates = [json.loads(line)["images_per_second"] for line in _lines(path / "metrics.jsonl")]
    return RunResult(
        name,
        evaluations,
        cost_of(model, _sampling(evaluations[-1])),
        statistics.median(rates) if rates else float("nan"),
        load_preview(path, evaluations[-1].step),
    )


def result_sections(results: Sequence[RunResult]) -> list[Section]:
    """Makes the sections on quality, cost and samples.

    Raises:
        InputError: If the runs were not evaluated alike.
    """
    _require_one_protocol(results)
    metrics = list(results[0].last.distances)
    curves = [
        Section(
            f"Quality while training: {metric}",
            "Frechet distance between samples and training images; lower is better.",
            _curves(results, metric),
        )
        for metric in metrics
        if all(metric in e.distances for r in results for e in r.evaluations)
    ]
    grids = [Section(f"Samples: {r.name}", _grid_text(r.last), _grid(r)) for r in results]
    return [*curves, _figures(results), *grids]


def images_to_reach(run: RunResult, metric: str, target: float) -> float | None:
    """Returns after how many images a run's distance first falls to a target, or None.

    Between two checkpoints the curve is a straight line.

    Example:
        A run at 0.5 after 100 images and at 0.3 after 200 reaches 0.4 after 150.
    """
    before: tuple[float, float] | None = None
    for evaluation in run.evaluations:
        images, distance = evaluation.images, evaluation.distances.get(metric)
        if distance is None:
            continue
        if distance <= target:
            if before is None:
                return float(images)
            share = (before[1] - target) / (before[1] - distance)
            return before[0] + share * (images - before[0])
        before = (images, distance)
    return None


def copies(found: Evaluation) -> bool:
    """Says whether the samples hold more copies of training images than chance allows."""
    return found.memorisation is not None and found.memorisation["p_value"] < LEVEL


def speed_sentence(results: Sequence[RunResult]) -> str:
    """Says after how many images each run reaches the last figure of the first."""
    base, *others = results
    metric = next(iter(base.last.distances))
    target, total = base.last.distances[metric], base.last.images
    parts = []
    for run in others:
        images = images_to_reach(run, metric, target)
        if images is None:
            parts.append(f"{run.name} does not reach it ({run.last.distances[metric]:.3f})")
        else:
            share = images / total
            parts.append(f"{run.name} reaches it after {images:,.0f} ({100 * share:.0f} %)")
    first = f"{base.name} ends at {metric} {target:.3f} after {total:,} images"
    return f"{first}; {'; '.join(parts)}." if parts else f"{first}."


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _sampling(evaluation: Evaluation) -> SampleConfig:
    return SampleConfig(**evaluation.protocol["sampling"])


def _require_one_protocol(results: Sequence[RunResult]) -> None:
    """Figures of two protocols must not stand side by side."""
    first = results[0].last
    for run in results:
        for key in ("reference", "sampling"):
            if run.last.protocol[key] != first.protocol[key]:
                raise InputError(
                    f"{results[0].name} and {run.name} were evaluated with different {key}: "
                    "evaluate them with the same settings"
                )
        if list(run.last.distances) != list(first.distances):
            raise InputError(f"{results[0].name} and {run.name} were evaluated by other features")


def _curves(results: Sequence[RunResult], metric: str) -> str:
    series = [
        Series(
            r.name,
            [float(e.images) for e in r.evaluations],
            [e.distances[metric] for e in r.evaluations],
        )
        for r in results
    ]
    return line_chart(series, x_label="training images", y_label=metric, y_log=True)


def _figures(results: Sequence[RunResult]) -> Section:
    found = results[0].last
    text = (
        "Of the last checkpoint. MACs are per image and network call, attention included, as a "
        "mean over the calls of the sampler. The distance to the nearest training image is the "
        "median, as per-pixel RMS with pixels in [0, 1]. The copy rate is the share of samples "
        "nearer than 99 % of held-out real images come: 1 % is chance. Blurred samples are near to "
        "everything, so look at the pairs below before accusing."
    )
    real: Mapping[str, float] = found.protocol["held_out_real"] or {}
    if real and found.memorisation is not None:
        floor = ", ".join(f"{metric} {value:.4g}" for metric, value in real.items())
        text += (
            f"\n\nThe {found.protocol['held_out_images']:,} held-out real images themselves, "
            f"measured like samples, are at {floor}, and their median distance to the nearest "
            f"training image is {found.memorisation['held_out_median']:.3f}: that is what honest "
            "and perfect samples of as many would have."
        )
    return Section("All figures", text, _quality_table(results) + _cost_table(results))


def _quality_table(results: Sequence[RunResult]) -> str:
    metrics = list(results[0].last.distances)
    headers = ["run", *metrics, *(f"{m}, held-out snippets" for m in metrics)]
    rows = [[r.name, *_quality(r.last, metrics)] for r in results]
    best: dict[int, Literal["min", "max"]] = dict.fromkeys(range(1, len(headers)), "min")
    return table([*headers, "nearest training image", "copies, %"], rows, best=best)


def _quality(found: Evaluation, metrics: Sequence[str]) -> list[float | None]:
    second: Mapping[str, float] = found.held_out_snippets or {}
    figures = [*(found.distances[m] for m in metrics), *(second.get(m) for m in metrics)]
    copying = found.memorisation
    if copying is None:
        return [*figures, None, None]
    return [*figures, copying["median"], 100 * copying["copy_rate"]]


def _cost_table(results: Sequence[RunResult]) -> str:
    headers = ["run", "parameters", "MACs per call, millions", "training images per second"]
    return table(
        headers,
        [[r.name, r.cost.parameters, r.cost.mean_macs / 1e6, round(r.rate)] for r in results],
    )


def _grid_text(found: Evaluation) -> str:
    return (
        f"Not selected: images 0 to {_SHOWN - 1} of the evaluation after {found.images:,} training "
        "images, each beside its nearest training image and the distance between them."
    )


def _grid(run: RunResult) -> str:
    shown = {name: tensor[:_SHOWN] for name, tensor in run.preview.items()}
    scale = max(1.0, 48 / shown["samples"].shape[-1])
    return neighbour_grid(
        shown["samples"], shown["neighbours"], shown["distances"], columns=5, scale=scale
    )
