"""Every command and snippet of the README runs, in order, in an empty folder."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from stratagem.assemble import make_backbone
from stratagem.cli import VERBS, main
from stratagem.config import load
from stratagem.nets.cost import parameters

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = blocks("python")
    assert len([line for line in snippet.splitlines() if line]) <= 24
    monkeypatch.chdir(tmp_path)
    Path("snippet.py").write_text(snippet.replace("steps=400", "steps=20"))
    runpy.run_path("snippet.py")
    assert len(list(Path("out/samples").glob("*.png"))) == 16


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    example = tmp_path / "examples" / "digits.yaml"
    body = yaml.safe_load(example.read_text())
    body["train"] |= {"steps": 20, "warmup_steps": 2, "checkpoint_every": 10}  # shorter, no more
    example.write_text(yaml.safe_dump(body))
    monkeypatch.chdir(tmp_path)
    text = "".join(blocks("sh")[1:])
    commands = [line for line in text.splitlines() if line.startswith("stratagem ")]
    assert len(commands) == 9 + 3
    for line in commands:
        assert main(shlex.split(line)[1:]) == 0, line


def test_make_targets_exist() -> None:
    targets = re.findall(r"^make (\w+)", blocks("sh")[0], re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)


def test_links_and_verbs_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
    mentioned = set(re.findall(r"^stratagem (bank \w+|\w+)", README, re.MULTILINE))
    assert mentioned <= set(VERBS)


@pytest.mark.parametrize(
    ("name", "published"), [("gmem-xl-sde", 674_989_472), ("gmem-b-sde", 130_378_016)]
)
def test_presets_build_networks_of_the_published_size(name: str, published: int) -> None:
    """The count of gmem: without the training head, with the fixed position embedding."""
    made = {"shape": [32, 16, 16], "num_classes": 0, "memory_dim": 768, "stages": None}
    with torch.device("meta"):
        net = make_backbone(load(ROOT / "examples" / "presets" / f"{name}.yaml"), made)
    assert parameters(net) + net.encoder.positions.numel() == published


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda p: p.name)
def test_examples_load(path: Path) -> None:
    assert load(path).data
