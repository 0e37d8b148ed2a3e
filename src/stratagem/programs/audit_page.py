"""The page of an audit: the verdict, its evidence, the closest pairs, and what it cannot tell."""

from __future__ import annotations

import torch
from torch import Tensor

from stratagem.metrics.memorisation import LEVEL, Memorisation
from stratagem.programs.audit import Audit, percent, probability
from stratagem.report.bank_map import bank_map
from stratagem.report.charts import Series, format_number, line_chart
from stratagem.report.page import Section, neighbour_grid, page, table

__all__ = ["audit_page"]

_POINTS = 60
_UNKNOWN = {"nan", "nan %", "not finite"}
_UNITS = {"pixels": "per-pixel RMS, pixels in [0, 1]"}


def audit_page(found: Audit) -> str:
    """Writes the page of an audit as HTML."""
    bank = found.audited.bank
    sections = [
        _figures(found),
        _distances(found),
        *(_pairs(found, name) for name in found.spaces),
        *_diversity(found),
        *_quality(found),
        *([] if bank is None else [_map(found)]),
        _limits(found),
    ]
    told = found.protocol
    made = told.get("run") or told.get("samples")
    footer = (
        f"Made by stratagem {told['stratagem']} (audit) of {made}, {told['samples_used']:,} "
        f"samples, and of {told['data']} ({told['fingerprint'][:12]}), {told['training_images']:,} "
        f"training and {told['held_out_images']:,} held-out images."
    )
    return page(
        "Are these samples copies of training images?", found.verdict.sentence, sections, footer
    )


def _figures(found: Audit) -> Section:
    spaces = found.spaces.values()
    level = f"{next(iter(spaces)).level:g}"
    mirrored = ", or its mirror image to it," if found.protocol["mirrored"] else ""
    text = (
        "Every sample is compared with every training image, and so is every held-out real image, "
        "which no network has seen: what is usual for those is no sign of copying. The distance of "
        f"a sample is that to the nearest training image{mirrored} in pixels and in the vectors of "
        "frozen networks.\n\n"
        "Copies are samples that are nearer to a training image, measured against their distance "
        "to the nearest held-out image, than 99 % of held-out images are; p is the probability of "
        f"as many by chance, and less than {level} an accusation: {len(spaces)} such tests accuse "
        f"one honest sampler in {1 / LEVEL:,.0f} at most. Near samples are so by the distance "
        "itself, which is small for plain images, too. The distance ratio is the median of samples "
        "over that of held-out images. C_T (Meehan et al. 2020) compares the same distances region "
        "by region: below \N{MINUS SIGN}3 samples are too near, above 3 too far. AuthPct (Alaa et "
        "al. 2022) is the share of samples that are farther from their training image than that "
        "one is from the next."
    )
    rows: list[list[str | float | None]] = [
        ["copies", "1 %", *(percent(m.copied.rate) for m in spaces)],
        ["p of copies", f"above {level}", *(probability(m.copied.p_value) for m in spaces)],
        ["near samples", "1 %", *(percent(m.near.rate) for m in spaces)],
        ["p of near samples", f"above {level}", *(probability(m.near.p_value) for m in spaces)],
        ["distance ratio", "1", *(f"{m.ratio:.2f}" for m in spaces)],
        ["C_T", "\N{MINUS SIGN}3 to 3", *(format_number(round(m.score, 1)) for m in spaces)],
        ["AuthPct", None, *(percent(m.authentic) for m in spaces)],
    ]
    rows = [["unknown" if cell in _UNKNOWN else cell for cell in row] for row in rows]
    return Section("Figures", text, table(["figure", "honest", *found.spaces], rows))


def _distances(found: Audit) -> Section:
    text = (
        "The share of images that come so near to a training image. Copies lift the left end of "
        "the curve of the samples above that of held-out images."
    )
    charts = [
        line_chart(
            [_share("samples", m.distances), *_held_out(m)],
            x_label=f"distance to the nearest training image ({_unit(name)})",
            y_label="share of images at most so far",
            title=f"In {name}",
        )
        for name, m in found.spaces.items()
    ]
    return Section("How near samples come", text, "".join(charts))


def _unit(space: str) -> str:
    return _UNITS.get(space, "Euclidean, of the vectors")


def _held_out(found: Memorisation) -> list[Series]:
    return [_share("held-out images", found.held_out)] if len(found.held_out) else []


def _share(name: str, distances: Tensor) -> Series:
    shares = torch.linspace(0, 1, _POINTS, dtype=torch.float64)
    return Series(name, distances.quantile(shares).tolist(), shares.tolist())


def _pairs(found: Audit, name: str) -> Section:
    samples, images = found.pairs(name)
    pictures, space = found.audited.images[samples], found.spaces[name]
    text = (
        f"The {len(samples)} most suspicious of {len(found.audited.images):,} samples, the most "
        "suspicious first. "
    )
    if len(space.relative):
        shown = space.relative
        text += (
            "Below each is its distance to that training image, divided by its distance to the "
            "nearest held-out image: near 1 it is no nearer to the one than to the other, near 0 "
            "it is a copy."
        )
    else:
        shown = space.distances
        text += f"Below each is its distance to that training image ({_unit(name)})."
    body = neighbour_grid(
        pictures,
        found.data.images(images),
        shown[samples],
        columns=5,
        scale=max(1.0, 64 / pictures.shape[-1]),
        caption="Left: a sample. Right: the training image nearest to it.",
    )
    return Section(f"The closest pairs in {name}", text, body)


def _diversity(found: Audit) -> list[Section]:
    if not found.diversity:
        return []
    text = (
        "Images that one snippet makes of different noise, beside images of different snippets: "
        "the mean distance of two. A ratio near 0 would mean that the network only paints its "
        "snippet."
    )
    rows: list[list[str | float | None]]
    headers = ["compared in", "one snippet", "standard error", "different snippets", "ratio"]
    rows = [
        [name, d.within, d.error, d.between, d.within / d.between]
        for name, d in found.diversity.items()
    ]
    return [Section("Diversity per snippet", text, table([*headers], rows))]


def _quality(found: Audit) -> list[Section]:
    if not found.quality:
        return []
    text = (
        "Frechet distances to the training images. Snippets of training images may flatter a "
        "network that repeats them; held-out snippets cannot. Held-out real images stand for "
        f"perfect samples, of which there are {found.protocol['held_out_images']:,} here against "
        f"{found.protocol['samples_used']:,}: the fewer images, the greater the distance."
    )
    rows: list[list[str | float | None]]
    metrics = list(found.quality["samples"])
    rows = [[kind, *(values.get(m) for m in metrics)] for kind, values in found.quality.items()]
    return [Section("Quality", text, table(["images", *metrics], rows))]


def _map(found: Audit) -> Section:
    assert found.audited.bank is not None
    text = "The memory bank by the two directions in which it varies most, coloured by class."
    return Section("The memory bank", text, bank_map(found.audited.bank, found.data.classes))


def _limits(found: Audit) -> Section:
    held_out = found.protocol["held_out_images"]
    few = (
        f" With only {held_out} held-out images the yardstick is coarse; hold out 100 or more."
        if held_out < 100
        else ""
    )
    text = (
        "Copies of a part of an image, or of one that was cropped, moved or recoloured, are found "
        "only as far as a space does not see the change; pixels see every shift. A training image "
        "that is in the data several times, or in the held-out images too, hides its copies. The "
        f"audit speaks of these {found.protocol['samples_used']:,} samples: rare copies need more."
        f"{few} That no copy was found does not make a network private."
    )
    return Section("What this cannot tell", text)
