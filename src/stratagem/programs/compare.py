"""`stratagem compare`: evaluated runs into one page that opens offline.

    curves   Frechet distance against training images seen, with a band over seeds
    fronts   Frechet distance against what training and sampling cost
    table    distance, cost and memorisation of the last checkpoint of each run
    maps     each memory bank by its two principal components, and the agreement of noise levels
             that stages come from
    grids    samples beside their nearest training images

Runs that differ in the seed alone are joined. The first is the baseline: the page says after how
many images the others reach its last figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from stratagem.errors import InputError
from stratagem.memory.bank import MemoryBank
from stratagem.metrics.memorisation import LEVEL
from stratagem.programs.evaluate import Evaluation
from stratagem.programs.results import RunResult, join_seeds, read_run
from stratagem.report.agreement import FRAMES, agreement_map
from stratagem.report.bank_map import bank_map
from stratagem.report.charts import Series, line_chart
from stratagem.report.fronts import front_chart
from stratagem.report.page import Section, neighbour_grid, page, save_page, table

__all__ = ["RunResult", "compare", "images_to_reach", "read_run", "result_sections", "too_near"]

_SHOWN = 20


def compare(runs: Sequence[Path], out: Path) -> str:
    """Writes the report of evaluated runs and returns the sentence on who is faster.

    Args:
        runs: Run folders; the first is the baseline.
        out: The HTML file to write; an older one is replaced.

    Raises:
        InputError: If a run is missing or not evaluated, or evaluations differ in protocol.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise InputError("a run is named twice: name each once")
    results = join_seeds([read_run(run.name, run) for run in runs])
    if len({result.name for result in results}) < len(results):
        raise InputError("two runs have the same name: rename a folder")
    sections = result_sections(results)
    lead = speed_sentence(results)
    save_page(out, page("Comparison of runs", lead, sections, "Made by stratagem compare."))
    return lead


def result_sections(results: Sequence[RunResult]) -> list[Section]:
    """Makes the sections on quality, cost, memory banks and samples.

    Raises:
        InputError: If the runs were not evaluated alike.
    """
    _require_one_protocol(results)
    metrics = list(results[0].last.distances)
    curves = [
        Section(
            f"Quality while training: {metric}",
            f"Frechet distance between samples and training images, {_features(metric)}; lower is "
            f"better.{_bands(results)}",
            _curves(results, metric),
        )
        for metric in metrics
        if all(metric in e.distances for r in results for e in r.evaluations)
    ]
    grids = [Section(f"Samples: {r.name}", _grid_text(r), _grid(r)) for r in results]
    return [
        *curves,
        *_fronts(results),
        _figures(results),
        *_maps(results),
        *_agreements(results),
        *grids,
    ]


def _features(metric: str) -> str:
    """Says of what a Frechet distance is."""
    name = metric.removeprefix("fd_")
    net, num = name.rstrip("0123456789"), name[len(name.rstrip("0123456789")) :]
    kinds = {
        "fid": "of Inception-v3's features, as is the custom",
        "sfid": "of Inception-v3's spatial features",
        "pixels": f"of the first {num} principal components of the pixels",
        "effnet": "of EfficientNet-Lite0's features"
        + (f", of which the first {num} principal components" if num else ""),
    }
    return kinds.get(net, f"of the features {name}")


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


def too_near(found: Evaluation) -> bool:
    """Says whether more samples are near to training images than chance allows."""
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
            share = f" ({100 * images / total:.0f} %)" if total else ""
            parts.append(f"{run.name} reaches it after {images:,.0f}{share}")
    first = f"{base.name} ends at {metric} {target:.3f} after {total:,} images"
    return f"{first}; {'; '.join(parts)}." if parts else f"{first}."


def _require_one_protocol(results: Sequence[RunResult]) -> None:
    """Figures of two protocols must not stand side by side."""
    first = results[0].last
    for run in results:
        for key in ("reference", "sampling"):
            if _but_seed(run.last.protocol[key]) != _but_seed(first.protocol[key]):
                raise InputError(
                    f"{results[0].name} and {run.name} were evaluated with different {key}: "
                    "evaluate them with the same settings"
                )
        if list(run.last.distances) != list(first.distances):
            raise InputError(f"{results[0].name} and {run.name} were evaluated by other features")


def _agreements(results: Sequence[RunResult]) -> list[Section]:
    """Shows what the stages come from, each matrix once."""
    text = f"How many pixels the best possible denoisers of two noise levels agree on. {FRAMES}"
    shown: dict[tuple[float, ...], Section] = {}
    for run in results:
        if run.agreement is not None and run.agreement.edges not in shown:
            title, body = f"Agreement of noise levels: {run.name}", agreement_map(*run.agreement)
            shown[run.agreement.edges] = Section(title, text, body)
    return list(shown.values())


def _but_seed(part: object) -> object:
    return {k: v for k, v in part.items() if k != "seed"} if isinstance(part, dict) else part


def _bands(results: Sequence[RunResult]) -> str:
    joined = any(r.bands for r in results)
    return " Lines are means over seeds, bands their least and greatest." if joined else ""


def _curves(results: Sequence[RunResult], metric: str) -> str:
    series = [_series(r, metric, lambda _, e: float(e.images)) for r in results]
    return line_chart(series, x_label="training images", y_label=metric, y_log=True)


def _series(
    run: RunResult, metric: str, cost: Callable[[RunResult, Evaluation], float], last: bool = False
) -> Series:
    """A metric over a cost, at every checkpoint or at the last one alone."""
    found, bands = run.evaluations, run.bands
    if last:
        found, bands = found[-1:], bands[-1:]
    x, y = [cost(run, e) for e in found], [e.distances[metric] for e in found]
    low, high = ([b[metric][side] for b in bands] if bands else None for side in (0, 1))
    return Series(run.name, x, y, low, high, scatter=last)


def _fronts(results: Sequence[RunResult]) -> list[Section]:
    """Charts of quality over cost, where there are runs to compare."""
    if len(results) < 2:
        return []
    metric = next(iter(results[0].last.distances))
    training = [
        _series(r, metric, lambda run, e: e.images * run.cost.mean_macs_draws / 1e9)
        for r in results
    ]
    sampling = [
        _series(r, metric, lambda run, _: sum(run.cost.calls) * run.cost.mean_macs / 1e6, last=True)
        for r in results
    ]
    text = (
        "The same distance against what it cost. The grey steps are the front: what no other run "
        "beats at that cost. MACs of the network alone, attention included; a training step costs "
        "about three times its forward pass, which is what is counted."
    )
    body = front_chart(
        training,
        x_label="billions of MACs: training images seen x MACs of a call",
        y_label=metric,
        title="Training",
    ) + front_chart(
        sampling,
        x_label="millions of MACs per sampled image, all network calls",
        y_label=metric,
        title="Sampling, last checkpoint",
    )
    return [Section("Quality against cost", text, body)]


def _maps(results: Sequence[RunResult]) -> list[Section]:
    """Maps of the memory banks, each once."""
    banks: dict[tuple[int, str, str], tuple[str, MemoryBank]] = {}
    for run in results:
        if run.bank is not None:
            encoder = str(run.bank.encoder.get("name"))
            key = (run.bank.num, str(run.bank.encoder), run.bank.data)
            banks.setdefault(key, (encoder, run.bank))
    text = (
        "Made once, by a frozen encoder. Each dot is a snippet, by the two directions in which the "
        "bank varies most; colours are classes, which the bank was not told when it was made."
    )
    return [
        Section(f"The memory bank: {encoder}, {bank.num:,} snippets", text, bank_map(bank))
        for encoder, bank in banks.values()
    ]


def _figures(results: Sequence[RunResult]) -> Section:
    found = results[0].last
    text = (
        "Of the last checkpoint. MACs are per image and network call, attention included, as a "
        "mean over the calls of the sampler; images per second are the median. The distance to the "
        "nearest training image is the median, as per-pixel RMS with pixels in [0, 1]. Near "
        "samples are those that are nearer than 99 % of held-out real images come: 1 % is "
        "chance. Copies are near, and so are blurred or plain samples: stratagem audit tells them "
        "apart."
    )
    real: Mapping[str, float] = found.protocol["held_out_real"] or {}
    if real and found.memorisation is not None:
        floor = ", ".join(f"{metric} {value:.4g}" for metric, value in real.items())
        text += (
            f"\n\nThe {found.protocol['held_out_images']:,} held-out real images themselves, "
            f"measured like samples, are at {floor}, and their median distance to the nearest "
            f"training image is {found.memorisation['held_out_median']:.3f}: that is what honest "
            f"and perfect samples of as many would have. Here are {found.num:,} samples, and a "
            "Frechet distance is the less the more there are."
        )
    return Section("All figures", text, _quality_table(results) + _cost_table(results))


def _quality_table(results: Sequence[RunResult]) -> str:
    metrics = list(results[0].last.distances)
    headers = ["run", *metrics, *(f"{m}, held-out snippets" for m in metrics)]
    best: dict[int, Literal["min", "max"]] = dict.fromkeys(range(1, len(headers)), "min")
    headers += ["nearest training image", "near samples, %"]
    rows = [[r.name, *_quality(r.last, metrics)] for r in results]
    if any(r.bands for r in results):
        headers += [f"{m}, range over seeds" for m in metrics]
        for row, run in zip(rows, results, strict=True):
            ends = [run.bands[-1].get(m) if run.bands else None for m in metrics]
            row += [None if e is None else f"{e[0]:.4g} to {e[1]:.4g}" for e in ends]
    return table(headers, rows, best=best)


def _quality(found: Evaluation, metrics: Sequence[str]) -> list[str | float | None]:
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
        [
            [r.name, r.cost.parameters, r.cost.mean_macs / 1e6, r.rate and round(r.rate)]
            for r in results
        ],
    )


def _grid_text(run: RunResult) -> str:
    first = " of the first seed" if run.seeds > 1 else ""
    return (
        f"Not selected: images 0 to {_SHOWN - 1}{first} of the evaluation after "
        f"{run.last.images:,} training images, each beside its nearest training image and the "
        "distance between them."
    )


def _grid(run: RunResult) -> str:
    shown = {name: tensor[:_SHOWN] for name, tensor in run.preview.items()}
    scale = max(1.0, 48 / shown["samples"].shape[-1])
    return neighbour_grid(
        shown["samples"], shown["neighbours"], shown["distances"], columns=5, scale=scale
    )
