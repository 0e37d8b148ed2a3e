"""The page of the demonstration: what was done, what came out, and what it means."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from stratagem import __version__
from stratagem.assemble import make_schedule
from stratagem.config import RunConfig
from stratagem.data.shards import DataSet
from stratagem.programs.compare import RunResult, images_to_reach, result_sections, too_near
from stratagem.report.agreement import agreement_chart
from stratagem.report.charts import format_number
from stratagem.report.page import Section, image_grid, page, table
from stratagem.stages import Stages

__all__ = ["DemoResult", "demo_page"]


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration made.

    Attributes:
        data: The data set.
        stages: The stages.
        base: Configuration of the plain run.
        runs: Results, the plain run first.
        chosen: The encoder that was taken.
    """

    data: Path
    stages: Path
    base: RunConfig
    runs: list[RunResult]
    chosen: str


def demo_page(result: DemoResult, sentence: str) -> str:
    """Writes the page as HTML.

    Args:
        result: What the demonstration made.
        sentence: Who reaches the baseline's quality after how many images.
    """
    first, *rest = result_sections(result.runs)
    sections = [_setting(result), first, _encoders(result), _stages(result), *rest]
    return page("Stratagem: both methods on real images", sentence, sections, _footer(result))


def _setting(result: DemoResult) -> Section:
    data, train, model = DataSet.open(result.data), result.base.train, result.base.model
    names = ", ".join(name for name, _ in data.rejected[:3])
    left_out = (
        f"; files that could not be used: {len(data.rejected)}, such as {names}" if names else ""
    )
    text = (
        f"{len(data.train_indices):,} real images of {data.shape[1]} x {data.shape[2]} pixels "
        f"({data.source}{left_out}); {len(data.held_out_indices):,} more were held out, to "
        "measure memorisation with. Every network is a small transformer of width "
        f"{model.width} that sees the same {train.steps * train.batch_size:,} images in the same "
        "order, with the same noise and times, from the same seed (flow path, v-prediction, "
        f"logit-normal times, AdamW at {train.learning_rate:g}, averaged weights).\n\n"
        "plain has neither method. memory is given a snippet: the feature vector of one training "
        "image, from a bank made once by a frozen encoder. stages has one decoder per stage of the "
        "noise axis, deep near the data and shallow near the noise, behind a shared encoder. Below "
        "are the first real images."
    )
    shown = data.images(data.train_indices[:24])
    return Section("What was done", text, image_grid(shown, columns=12, scale=_scale(data)))


def _encoders(result: DemoResult) -> Section:
    runs = [r for r in result.runs if r.name.startswith("memory-")]
    metric, target = next(iter(result.runs[0].last.distances.items()))
    rows: list[list[str | float | None]] = []
    for run in runs:
        held, audit = run.last.held_out_snippets, run.last.memorisation
        assert held is not None
        assert audit is not None
        images = images_to_reach(run, metric, target)
        rows.append(
            [
                run.name,
                None if images is None else round(images),
                run.last.distances[metric],
                held[metric],
                audit["median"],
                audit["held_out_median"],
                100 * audit["copy_rate"],
            ]
        )
    headers = [
        "encoder",
        "images to reach plain",
        metric,
        f"{metric}, held-out snippets",
        "nearest training image",
        "of held-out real images",
        "near samples, %",
    ]
    flagged = [run.name for run in runs if too_near(run.last)]
    verdict = (
        f"More samples than chance allows are near to training images: {' and '.join(flagged)}. "
        if flagged
        else "Neither has more samples near to training images than chance allows. "
    )
    text = (
        "A snippet is only as good as the encoder that makes it. pixels is the image itself, "
        "scaled to unit length; effnet is EfficientNet-Lite0 with ImageNet weights. Both were "
        f"measured. {verdict}memory+stages takes {result.chosen}, which reaches the last distance "
        "of plain after fewer images; one with too many near samples would have come second."
    )
    return Section("Which memory encoder", text, table(headers, rows))


def _stages(result: DemoResult) -> Section:
    stages, record = Stages.load(result.stages)
    schedule = make_schedule(record["schedule"])
    times = stages.times(schedule)
    edges = "; ".join(
        f"t = {t:.3f} (log-SNR {format_number(round(e, 2))})"
        for t, e in zip(times, stages.edges, strict=True)
    )
    staged = [r for r in result.runs if len(r.cost.stage_macs) > 1]
    cost = "".join(
        f" {r.name} spends {', '.join(f'{m / 1e6:.3f} M' for m in r.cost.stage_macs)} MACs in its "
        f"stages, which the sampler calls {', '.join(map(str, r.cost.calls))} times."
        for r in staged[:1]
    )
    text = (
        "For a finite data set the best possible denoiser is known in closed form. Where its "
        "answer at one noise level agrees with that at another, one decoder can serve both; "
        "the axis is cut where the agreement within the stages is greatest (dynamic programme). "
        f"Here: {edges}.{cost}\n\n"
        "Whether stages help at this size is an open question: the figures below are what came "
        "out, and nothing was tuned on them."
    )
    chart = agreement_chart({"": record["curves"]}, times)
    return Section("Where the stages are", text, chart)


def _scale(data: DataSet) -> float:
    """Enlargement at which an image is about 48 pixels wide."""
    return max(1.0, 48 / data.shape[2])


def _footer(result: DemoResult) -> str:
    sampling = result.runs[0].last.protocol["sampling"]
    return (
        f"Made by stratagem {__version__} (demo, seed {result.base.seed}, "
        f"{result.base.train.steps} steps) with torch {torch.__version__}, "
        f"Python {platform.python_version()}, {result.base.train.threads} of {os.cpu_count()} CPU "
        f"threads. Each figure is of {sampling['num']:,} samples, {sampling['sampler']} in "
        f"{sampling['steps']} steps, against all training images. One seed: differences of a few "
        "per cent are noise."
    )
