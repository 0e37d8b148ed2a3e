"""Configurations: strict, helpful, and the same after a round trip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stratagem.config import (
    DiffusionConfig,
    MemoryConfig,
    ModelConfig,
    RunConfig,
    StagesConfig,
    UNetModelConfig,
    dump,
    load,
    parse,
)
from stratagem.config.checks import check_decoders
from stratagem.errors import InputError
from stratagem.train import TrainConfig


def test_round_trip(tmp_path: Path) -> None:
    config = RunConfig(
        data="d",
        seed=3,
        model=ModelConfig(width=64, depth=5, heads=2, style="sit"),
        diffusion=DiffusionConfig(density="uniform"),
        memory=MemoryConfig("bank", dropout=0.1),
        stages=StagesConfig("stages.json", 2, (3, 2, 1)),
        train=TrainConfig(steps=7, learning_rate=1e-5),
    )
    unet = replace(
        config,
        model=ModelConfig(),
        unet=UNetModelConfig(style="ldm", mults=(1, 2), attention=(), head_width=16),
        stages=StagesConfig(edges=(1.5, -2.0), attention=((8, 4), (), ()), shared_middle=False),
    )
    assert "model:" not in dump(unet)
    for c in (config, replace(config, memory=None, stages=None), unet):
        (tmp_path / "c.yaml").write_text(dump(c))
        assert load(tmp_path / "c.yaml") == c


def test_yaml_numbers_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data: d\ntrain: {learning_rate: 1e-4}\n")
    assert load(path).train.learning_rate == 1e-4
    config = load(path, ["train.steps=9", "memory.bank=b", "model.style=sit", "seed=4"])
    assert (config.train.steps, config.memory, config.seed) == (9, MemoryConfig("b"), 4)


WRONG = {
    "unknown key train.step; did you mean train.steps": {"train": {"step": 1}},
    "unknown key modle; did you mean model": {"modle": {}},
    "unknown key train.zzz; known are steps": {"train": {"zzz": 1}},
    "data is missing": {"data": ...},
    "memory.bank is missing": {"memory": {}},
    "train.steps must be a whole number, not 1.5": {"train": {"steps": 1.5}},
    "train.steps must be a whole number, not True": {"train": {"steps": True}},
    "train.learning_rate must be a number, not 'fast'": {"train": {"learning_rate": "fast"}},
    "model.labels must be true or false, not 1": {"model": {"labels": 1}},
    "data must be text": {"data": 5},
    "model must be a section": {"model": 5},
    "stages.depths must be a list": {"stages": {"file": "s", "shared": 1, "depths": 3}},
    "it ends in pure noise": {"diffusion": {"parameterization": "eps"}},
    "eps does not go with diffusion.schedule cosine": {
        "diffusion": {"schedule": "cosine", "parameterization": "eps"}
    },
    "choose one of linear, cosine": {"diffusion": {"schedule": "linar"}},
    "train.steps is 0: it must be above 0": {"train": {"steps": 0}},
    "train.learning_rate is nan": {"train": {"learning_rate": float("nan")}},
    "train.ema_decay is 1.0": {"train": {"ema_decay": 1}},
    "memory.dropout is 1.0": {"memory": {"bank": "b", "dropout": 1}},
    "train.threads is -1: it must not be negative": {"train": {"threads": -1}},
    "model.width 10 is not a multiple": {"model": {"width": 10, "heads": 3}},
    "condition_dropout has no effect": {"train": {"condition_dropout": 0.1}},
    "align.block is 5: it can be at most 4": {"model": {"depth": 4}, "align": {"block": 5}},
    "align_weight has no effect": {"train": {"align_weight": 1}},
    "edm needs edm": {"diffusion": {"schedule": "edm"}},
    "model has no effect beside unet": {"model": {"depth": 3}, "unet": {}},
    "unknown key unet.depth": {"unet": {"depth": 3}},
    "unet.style is 'ncsn': choose one of ddpm++": {"unet": {"style": "ncsn"}},
    "unet.norm_groups is 0: it must be above 0": {"unet": {"norm_groups": 0}},
    "unet.mults[1] must be a whole number": {"unet": {"mults": [1, 1.5]}},
    "align has no effect with a unet": {"unet": {}, "align": {}},
    "either file or edges": {"stages": {"shared": 1}},
    "file or edges: give one": {"stages": {"shared": 1, "file": "s", "edges": [1]}},
    "edges (1.0, 2.0) must decrease strictly": {"stages": {"shared": 1, "edges": [1, 2]}},
    "stages.shared is missing": {"stages": {"file": "s"}},
    "stages.shared has no effect with a unet": {"unet": {}, "stages": {"file": "s", "shared": 1}},
    "stages.depths has no effect with a unet": {"unet": {}, "stages": {"file": "s", "depths": [1]}},
    "stages.attention has no effect with a transformer": {
        "stages": {"file": "s", "shared": 1, "attention": [[4]]}
    },
    "stages.shared_middle has no effect with a transformer": {
        "stages": {"file": "s", "shared": 1, "shared_middle": False}
    },
    "stages.attention[0] must be a list": {
        "unet": {},
        "stages": {"file": "s", "attention": [4]},
    },
    "stages.widths has 2 decoders, but there are 3 stages": {
        "unet": {},
        "stages": {"edges": [2, 1], "widths": [8, 4]},
    },
    "stages.depths has 3 decoders, but there are 2 stages": {
        "model": {"depth": 3},
        "stages": {"edges": [2], "shared": 1, "depths": [2, 2, 1]},
    },
    "choose one of tailored, equal, separate, unified": {
        "stages": {"file": "s", "shared": 1, "form": "joint"}
    },
    "stages.budget has no effect with stages.form equal": {
        "stages": {"file": "s", "shared": 1, "form": "equal", "budget": 0.5}
    },
    "stages.form separate has none": {
        "model": {"depth": 3},
        "stages": {"file": "s", "shared": 2, "form": "separate"},
        "align": {"block": 1},
    },
    "no effect on density uniform": {"diffusion": {"density": "uniform", "density_mean": 1}},
    "each stage needs at least 1 block": {
        "stages": {"file": "s", "shared": 2, "depths": [1, 0]},
        "model": {"depth": 3},
    },
    "make model.depth 5": {
        "stages": {"file": "s", "shared": 2, "depths": [3, 1]},
        "model": {"depth": 4},
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_configurations_say_what_is_wrong(message: str) -> None:
    body = {"data": "d", **WRONG[message]}
    body = {key: value for key, value in body.items() if value is not ...}
    with pytest.raises(InputError) as error:
        parse(body, "file.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("file.yaml: ")


def test_unreadable_files_are_input_errors(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(InputError, match="does not exist"):
        load(path)
    for text, message in [("a: [", "not valid YAML"), ("- 1", "expected")]:
        path.write_text(text)
        with pytest.raises(InputError, match=message) as error:
            load(path)
        assert "\n" not in str(error.value)
    path.write_text("data: d")
    for override in ["steps", "=3", "data.x=3"]:
        with pytest.raises(InputError, match="--set"):
            load(path, [override])


def test_labels_are_those_of_the_network() -> None:
    assert not RunConfig("d").labels
    assert RunConfig("d", model=ModelConfig(labels=True)).labels
    assert RunConfig("d", unet=UNetModelConfig(labels=True)).labels
    body = {"data": "d", "unet": {"labels": True}, "train": {"condition_dropout": 0.1}}
    assert parse(body).labels  # there is something to drop


def test_decoders_are_counted_against_the_stages() -> None:
    staged = StagesConfig("s", 1, (2, 1))
    check_decoders(staged, 2)
    with pytest.raises(InputError, match="2 decoders, but there are 3 stages"):
        check_decoders(staged, 3)
