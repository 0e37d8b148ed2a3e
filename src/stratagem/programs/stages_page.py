"""The page beside a file of stages: curves of agreement, the matrix, and what each stage gets."""

from __future__ import annotations

from typing import Any

import torch

from stratagem.report.agreement import FRAMES, agreement_chart, agreement_map
from stratagem.report.page import Section, page, table

__all__ = ["stages_page"]


def stages_page(record: dict[str, Any]) -> str:
    """Returns the page of a search, of all that the file of the stages says."""
    edges, known = [edge["t"] for edge in record["edges"]], record["parameters"]
    settings = ", ".join(f"{k} {v}" for k, v in known.items())
    sections = [Section("What each stage gets", "", _shares(record))]
    if "curves" in record:
        sections += _agreement(record, edges)
    elif "affinity" in record:
        affinity = torch.tensor(record["affinity"])
        body = agreement_map(affinity, edges, value="cosine of the gradients")
        sections.append(Section("Agreement of each two noise levels", FRAMES, body))
    lead = f"{len(edges) + 1} stages of the noise axis, by method {record['method']}."
    return page("Stages", lead, sections, f"Made with {settings}. Data {record['data'][:12]}.")


def _agreement(record: dict[str, Any], edges: list[float]) -> list[Section]:
    space, curves = record["parameters"]["space"], {"": record["curves"]}
    body = agreement_map(torch.tensor(record["curves"]["matrix"]), edges)
    if (plain := record.get("without_memory")) is not None:
        curves[", no snippet"] = plain["curves"]
        matrix, cuts = torch.tensor(plain["curves"]["matrix"]), [e["t"] for e in plain["edges"]]
        body += agreement_map(matrix, cuts, title="The same without snippets")
    corners = (
        " Near t = 1 the best estimate of the noise is nearly the noise itself, as it is near "
        "t = 0: hence the agreement in the corners."
    )
    text = (
        "For a finite data set the best possible denoiser is known in closed form. The curves are "
        f"the shares of pixels whose {space} estimates at t agree with those at the two ends of "
        "the noise axis; bands are two standard errors over the draws."
    )
    return [
        Section("Agreement with the two ends", text, agreement_chart(curves, edges)),
        Section("Agreement of each two noise levels", FRAMES + corners * (space == "eps"), body),
    ]


def _shares(record: dict[str, Any]) -> str:
    edges = record["edges"]
    rows = []
    bounds = ["0", *(f"{edge['t']:.3f}" for edge in edges), "1"]
    shares = zip(record["share_of_draws"], record["share_of_calls"], strict=True)
    for k, (draws, calls) in enumerate(shares):
        upto = edges[k] if k < len(edges) else {"log_snr": None, "sigma_over_alpha": None}
        place = (f"{bounds[k]} to {bounds[k + 1]}", upto["log_snr"], upto["sigma_over_alpha"])
        rows.append((f"stage {k}", *place, 100 * draws, 100 * calls))
    headers = ("stage", "t", "to log-SNR", "to sigma/alpha", "training draws %", "sampler calls %")
    caption = f"Draws: {record['parameters']['density']}. Calls: {record['sampler']}."
    return table(headers, rows, caption=caption)
