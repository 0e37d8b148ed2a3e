"""The table and the report of a table's runs, for `runner.py`.

OUT/results.md      a row per configuration: mean over seeds (least to greatest), and a verdict
OUT/results.json    the figures of every seed, with the table that they are of
OUT/report.html     the table, and the sections of `stratagem compare`
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from stratagem.artifact import write_bytes
from stratagem.programs.compare import images_to_reach, result_sections, speed_sentence
from stratagem.programs.results import RunResult, join_seeds
from stratagem.programs.train_log import read_log
from stratagem.report.page import Section, page, save_page, table

__all__ = ["verdict", "write_report"]

Row = dict[str, float | None]


def write_report(
    file: Path, out: Path, groups: Mapping[str, Sequence[RunResult]], left: Mapping[str, str]
) -> str:
    """Writes results.json, results.md and report.html, and returns the table.

    Args:
        file: The table file.
        out: Its folder.
        groups: Name -> the seeds of a configuration, each called "NAME SEED"; the first is the
            baseline.
        left: What is not done -> how far it is.
    """
    first, base = next(iter(groups.items()))
    goals = {r.name.rpartition(" ")[2]: r for r in base}
    rows = {name: list(_figures(group, goals)) for name, group in groups.items()}
    headers, cells = _cells(rows, list(base[0].last.distances), first)
    text = (
        "Mean over seeds (least to greatest). Ranges that overlap are inconclusive. The baseline's "
        "last quality may be reached before the evaluation that first shows it."
    )
    text += _held_out(base[0])
    text += f" Not done: {'; '.join(f'{k} ({v})' for k, v in left.items())}." if left else ""
    lines = [headers, ["---"] * len(headers), *cells]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    write_bytes(out / "results.md", f"{text}\n\n{body}\n".encode())
    record = {"table": file.read_text(), "runs": rows, "left": left}
    write_bytes(out / "results.json", json.dumps(record, indent=1).encode())
    joined = [dataclasses.replace(join_seeds(g)[0], name=name) for name, g in groups.items()]
    sections = [Section("The table", text, table(headers, cells)), *result_sections(joined)]
    save_page(out / "report.html", page(file.stem, speed_sentence(joined), sections))
    return f"{text}\n\n{body}\n\nThe report: {out / 'report.html'}"


def verdict(values: Sequence[float], base: Sequence[float]) -> str:
    """Compares a distance over seeds with the baseline's; ranges that overlap decide nothing.

    Example:
        >>> verdict([0.2, 0.3], [0.4, 0.5]), verdict([0.2, 0.4], [0.3, 0.5])
        ('better', 'inconclusive')
    """
    if max(values) < min(base):
        return "better"
    return "worse" if min(values) > max(base) else "inconclusive"


def _figures(group: Sequence[RunResult], base: Mapping[str, RunResult]) -> Iterator[Row]:
    """Gives the figures of each seed of a run, by the headers of the table."""
    for result in group:
        last, seed = result.last, result.name.rpartition(" ")[2]
        metric, reached = next(iter(last.distances)), None
        if seed in base:
            goal = base[seed].last
            images = images_to_reach(result, metric, goal.distances[metric])
            reached = None if images is None else 100 * images / goal.images
        second, copying = last.held_out_snippets or {}, last.memorisation or {}
        yield {
            "seed": int(seed),
            **last.distances,
            "baseline reached after, % of its images": reached,
            **{f"{m}, held-out snippets": second.get(m) for m in last.distances},
            "near samples, %": 100 * copying["copy_rate"] if copying else None,
            "p of so many": copying.get("p_value"),
            "nearest training image": copying.get("median"),
            "parameters, M": result.cost.parameters / 1e6,
            "MACs per call, M": result.cost.mean_macs / 1e6,
            "training images": last.images,
            "training seconds": _seconds(Path(last.protocol["run"])),
        }


def _seconds(run: Path) -> float:
    """Returns how long training took, without evaluations and interruptions."""
    log = read_log(run / "metrics.jsonl")
    images = itertools.pairwise([0, *(line["images"] for line in log)])
    rates = (line["images_per_second"] for line in log)
    return sum((b - a) / rate for (a, b), rate in zip(images, rates, strict=True))


def _cells(
    rows: Mapping[str, list[Row]], distances: Sequence[str], base: str
) -> tuple[list[str], list[list[str]]]:
    """Writes the table: a row per run, a column per figure, and a verdict after each distance."""
    names = [name for name in next(iter(rows.values()))[0] if name != "seed"]
    headers, cells = ["run (seeds)"], [[f"{name} ({len(rows[name])})"] for name in rows]
    for name in names:
        headers.append(name)
        for line, (run, found) in zip(cells, rows.items(), strict=True):
            told = _told(found, name)
            text = _spread(told, len(found))
            if name in distances and run != base:
                text += f", {verdict(told, _told(rows[base], name))}"
            line.append(text)
    return headers, cells


def _told(found: Sequence[Row], name: str) -> list[float]:
    return [value for row in found if (value := row[name]) is not None]


def _spread(told: Sequence[float], seeds: int) -> str:
    if not told:
        return "-"
    short: Callable[[float], str] = "{:.3g}".format if max(told) < 1000 else "{:,.0f}".format
    mean, low, high = short(statistics.fmean(told)), short(min(told)), short(max(told))
    text = mean if low == high else f"{mean} ({low} to {high})"
    return text if len(told) == seeds else f"{text} in {len(told)} of {seeds}"


def _held_out(result: RunResult) -> str:
    real, copying = result.last.protocol["held_out_real"], result.last.memorisation
    if not real or copying is None:
        return ""
    told = ", ".join(f"{name} {value:.3g}" for name, value in real.items())
    num, median = result.last.protocol["held_out_images"], copying["held_out_median"]
    return f" The {num:,} held-out images: {told}, nearest training image {median:.3g}."
