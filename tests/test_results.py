"""Runs that differ in the seed alone become one, with bands."""

from __future__ import annotations

from dataclasses import replace

import pytest

from banks import flat
from stratagem.config import RunConfig
from stratagem.errors import InputError
from stratagem.programs.compare import result_sections, speed_sentence
from stratagem.programs.results import _setting, join_seeds
from stratagem.train import TrainConfig
from test_demo import result
from test_report import Reader


def seeds(name: str, *curves: dict[int, float], p_values: tuple[float, ...] = ()) -> list:
    chances = p_values or (1.0,) * len(curves)
    runs = [
        result(f"{name}-{k}", c, p) for k, (c, p) in enumerate(zip(curves, chances, strict=True))
    ]
    return [replace(run, setting=name) for run in runs]


def test_seeds_become_means_and_bands() -> None:
    runs = seeds(
        "plain", {100: 0.8, 200: 0.4}, {100: 1.0, 200: 0.5, 300: 0.1}, {100: 0.9, 200: 0.6}
    )
    other = result("memory", {100: 0.3, 200: 0.2})
    joined, alone = join_seeds([runs[0], other, *runs[1:]])
    assert alone is other
    assert joined.name == "plain (3 seeds)"
    assert joined.seeds == 3
    assert [e.images for e in joined.evaluations] == [100, 200]
    assert joined.last.distances["fd_x"] == pytest.approx(0.5)
    assert joined.bands == [{"fd_x": (0.8, 1.0)}, {"fd_x": (0.4, 0.6)}]


def test_the_most_suspicious_seed_counts() -> None:
    (joined,) = join_seeds(seeds("a", {100: 1.0}, {100: 1.0}, p_values=(0.5, 1e-4)))
    assert joined.last.memorisation is not None
    assert joined.last.memorisation["p_value"] == pytest.approx(2e-4)


def test_seeds_without_a_common_checkpoint_are_refused() -> None:
    with pytest.raises(InputError, match="a-0 and a-1 differ in the seed alone"):
        join_seeds(seeds("a", {100: 1.0}, {200: 1.0}))


def test_only_seed_and_threads_may_differ() -> None:
    base = RunConfig(data="d")
    assert _setting(base) == _setting(RunConfig(data="d", seed=3, train=TrainConfig(threads=1)))
    assert _setting(base) != _setting(RunConfig(data="d", train=TrainConfig(batch_size=7)))


def test_a_run_that_was_not_trained_here_is_compared_too() -> None:
    """An imported network has no log and saw no images of ours."""
    imported = replace(result("official", {0: 0.4}), rate=None)
    assert speed_sentence([imported, imported]).endswith("official reaches it after 0.")
    page = {s.title: s for s in result_sections([imported, result("plain", {100: 0.8})])}
    assert "official" in page["All figures"].body
    (joined,) = join_seeds([replace(imported, setting="a"), replace(imported, setting="a")])
    assert joined.rate is None


def test_the_page_shows_bands_fronts_and_the_bank() -> None:
    runs = seeds("plain", {100: 0.8, 200: 0.4}, {100: 1.0, 200: 0.6})
    memory = replace(result("memory", {100: 0.3, 200: 0.2}), bank=flat(dim=24))
    sections = {s.title: s for s in result_sections([*join_seeds(runs), memory])}
    curve = Reader(sections["Quality while training: fd_x"].body)
    assert len(curve.all("polygon")) == 1
    assert "means over seeds" in sections["Quality while training: fd_x"].text
    costs = Reader(sections["Quality against cost"].body)
    assert [a.get("class") for a in costs.all("polyline")].count("front") == 1
    assert "0.4 to 0.6" in Reader(sections["All figures"].body).text("td")
    assert sections["The memory bank: weighted, 200 snippets"].body.count("<circle") == 200
