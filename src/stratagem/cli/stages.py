"""`stratagem stages`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from stratagem.cli.console import progress_bar, say, say_json
from stratagem.clustering.search import Method
from stratagem.programs.stages import StageConfig
from stratagem.programs.stages import stages as find

__all__ = ["stages"]


def stages(
    data: Positional[Path],
    /,
    out: Path,
    num: int = 3,
    method: Method | None = None,
    config: Annotated[StageConfig, tyro.conf.arg(name="")] = StageConfig(),  # noqa: B008
    seed: int = 0,
    json: bool = False,
) -> None:
    """Finds the stages of the noise axis of a data set; beside OUT a page shows them.

    Example: stratagem stages out/photos --out out/photos-stages.json --num 3

    Args:
        data: The data set.
        out: The JSON file to write; the page has its name with .html.
        num: How many stages.
        method: optimal-denoiser (the paper's thresholds and their recursion), dp (most agreement
            inside the stages), or a baseline: gradient (needs a run), snr, uniform. By default
            optimal-denoiser, or dp where the data have no such thresholds.
        config: How to look for them.
        seed: Seed of all draws.
        json: Print JSON: all that OUT says but curves and matrices.
    """
    unit = "batches" if method == "gradient" else "samples"
    with progress_bar("stages", unit) as progress:
        record = find(
            data, out, num=num, method=method, seed=seed, config=config, progress=progress
        )
    if json:
        # Curves and matrices are for the page; OUT has them.
        heavy = {"curves", "affinity", "without_memory"}
        short = {key: value for key, value in record.items() if key not in heavy}
        if "without_memory" in record:
            short["edges_without_memory"] = record["without_memory"]["edges"]
        say_json(short)
    else:
        for line in _lines(out, record):
            say(line)


def _lines(out: Path, record: dict[str, Any]) -> list[str]:
    edges = record["edges"]
    num, page = len(edges) + 1, out.with_suffix(".html")
    lines = [f"{out}: {num} stages by {record['method']} ({page})"]
    if "thresholds" in record["parameters"]:
        lines.append(f"  and not by thresholds: {record['parameters']['thresholds']}")
    lines += [f"  edge at {_edge(edge)}" for edge in edges]
    bounds = ["0", *(f"{edge['t']:.3f}" for edge in edges), "1"]
    shares = zip(record["share_of_draws"], record["share_of_calls"], strict=True)
    lines += [
        f"  stage {k}, t {bounds[k]} to {bounds[k + 1]}: {draws:.1%} of training draws, "
        f"{calls:.1%} of sampler calls"
        for k, (draws, calls) in enumerate(shares)
    ]
    known = record["parameters"]
    lines.append(f"  draws {known['density']}; calls {record['sampler']}")
    if "eta" in known:
        low, high = known["range"]
        lines.append(
            f"  agreement within {known['eta']:g}{known['eta_unit'][1:]} (data from {low:g} to "
            f"{high:g}), {known['num_images']:,} images, {known['num_samples']:,} draws"
        )
    elif "run" in known:
        lines.append(f"  gradients of {known['run']}, mean over {known['num_samples']:,} draws")
    if "without_memory" in record:
        without = record["without_memory"]["edges"]
        pairs = zip(edges, without, strict=True)
        moved = ", ".join(f"{told['log_snr'] - plain['log_snr']:+.2f}" for told, plain in pairs)
        lines.append(f"  the snippets move the edges by {moved} in log-SNR; without them:")
        lines += [f"    edge at {_edge(edge)}" for edge in without]
    return lines


def _edge(edge: dict[str, float]) -> str:
    return (
        f"log-SNR {edge['log_snr']:.4f}, sigma/alpha {edge['sigma_over_alpha']:.4f}, "
        f"t {edge['t']:.4f}"
    )
