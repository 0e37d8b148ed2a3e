"""The page beside a file of stages: curves of agreement, the matrix, and what each stage gets."""

from __future__ import annotations

from typing import Any

import torch

from stratagem.clustering.search import StageSearch
from stratagem.clustering.similarity import Similarity
from stratagem.report.charts import Series, line_chart
from stratagem.report.heatmap import heat_map
from stratagem.report.page import Section, page, table

__all__ = ["stages_page"]

_TIME = "time t (0 clean, 1 noise)"


def stages_page(search: StageSearch, without: StageSearch | None, record: dict[str, Any]) -> str:
    """Returns the page of a search.

    Args:
        search: The stages and what was looked at.
        without: The search without snippets, if there is one.
        record: What the file of the stages says.
    """
    edges = [edge["t"] for edge in record["edges"]]
    settings = ", ".join(f"{k} {v}" for k, v in search.parameters.items())
    sections = [Section("What each stage gets", "", _shares(record))]
    if isinstance(search.evidence, Similarity):
        what = f"{record['parameters']['space']} estimates"
        text = (
            "For a finite data set the best possible denoiser is known in closed form. The curves "
            f"are the shares of pixels whose {what} at t agree with those at the two ends of the "
            "noise axis; bands are two standard errors over the draws."
        )
        sections.append(
            Section("Agreement with the two ends", text, _curves(search, without, edges))
        )
        matrix, name = search.evidence.matrix, "share of pixels that agree"
    elif search.evidence is not None:
        matrix, name = search.evidence, "cosine of the gradients"
    else:
        matrix = torch.empty(0)
    if len(matrix):
        body = heat_map(matrix, label=_TIME, value=name, edges=edges)
        if without is not None and isinstance(without.evidence, Similarity):
            old = [edge["t"] for edge in record["without_memory"]["edges"]]
            plain = without.evidence.matrix
            body += heat_map(
                plain, label=_TIME, value=name, edges=old, title="The same without snippets"
            )
        text = "Frames are the stages: what is shared inside one decoder, and what is not."
        if search.parameters.get("space") == "eps":
            text += (
                " Near t = 1 the best estimate of the noise is nearly the noise itself, as it is "
                "near t = 0: hence the agreement in the corners."
            )
        sections.append(Section("Agreement of each two noise levels", text, body))
    lead = f"{search.stages.num} stages of the noise axis, by method {search.method}."
    return page("Stages", lead, sections, f"Made with {settings}. Data {record['data'][:12]}.")


def _curves(search: StageSearch, without: StageSearch | None, edges: list[float]) -> str:
    ends = {"to_clean": "clean end", "to_noise": "noise end"}
    series = []
    for one, note in ((search, ""), (without, ", no snippet")):
        if one is None:
            continue
        curves = vars(one.evidence)
        for key, end in ends.items():
            mean, spread = curves[key], 2 * curves[f"{key}_se"]
            bands = ((mean - spread).tolist(), (mean + spread).tolist())
            series.append(Series(end + note, curves["times"].tolist(), mean.tolist(), *bands))
    marks = [(t, f"edge {k + 1}") for k, t in enumerate(edges)]
    return line_chart(series, x_label=_TIME, y_label="share of pixels that agree", marks=marks)


def _shares(record: dict[str, Any]) -> str:
    edges = record["edges"]
    rows = []
    for k, (draws, calls) in enumerate(
        zip(record["share_of_draws"], record["share_of_calls"], strict=True)
    ):
        ends = [f"{e['t']:.3f}" for e in edges]
        upto = edges[k] if k < len(edges) else {"log_snr": None, "sigma_over_alpha": None}
        times = f"{['0', *ends][k]} to {[*ends, '1'][k]}"
        rows.append(
            (
                f"stage {k}",
                times,
                upto["log_snr"],
                upto["sigma_over_alpha"],
                100 * draws,
                100 * calls,
            )
        )
    headers = ("stage", "t", "to log-SNR", "to sigma/alpha", "training draws %", "sampler calls %")
    caption = f"Draws: {record['parameters']['density']}. Calls: {record['sampler']}."
    return table(headers, rows, caption=caption)
