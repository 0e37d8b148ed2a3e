"""A bank is edited, a network is not: teach it a class that it never saw, and take one away.

Digits without the nines are prepared and a memory network is trained on them. Then, with the
weights as they are,

    add      images of nines join the bank; samples of their snippets should be nines
    remove   the threes leave the bank; samples of the rest should hold no threes

Whether a sample is a nine is judged by the nearest of all 1,797 real digits. The commands are those
of the command line. Beside them stand two yardsticks: real nines that are left out of the judge's
digits one at a time, and the same network given snippets of the classes that it knows.

    python experiments/edit_without_training.py out/edit [--steps 1200] [--seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from stratagem.cli import main as stratagem
from stratagem.config import MemoryConfig, ModelConfig, RunConfig, dump
from stratagem.data.datasets import digits
from stratagem.metrics.features import PixelComponents
from stratagem.metrics.frechet import frechet_distance, moments
from stratagem.metrics.memorisation import nearest
from stratagem.programs.sources import open_source
from stratagem.report.page import Section, image_grid, page, save_page
from stratagem.train import TrainConfig

NEW, GONE = 9, 3


def run(*words: str | Path) -> None:
    """Calls the command line, and stops if it fails."""
    print("stratagem", *words, flush=True)
    if stratagem([str(w) for w in words]):
        raise SystemExit(1)


def write_folders(out: Path, images: Tensor, labels: Tensor) -> None:
    """Writes the known classes into one folder each, and the new one apart."""
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        folder = out / "nines" if label == NEW else out / "known" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{number:04d}.png")


def shares(samples: Tensor, images: Tensor, labels: Tensor) -> list[float]:
    """Returns the share of each class among samples, by their nearest real digit."""
    _, index = nearest(samples.flatten(1), images.flatten(1))
    return (torch.bincount(labels[index], minlength=10) / len(samples)).tolist()


def real_shares(images: Tensor, labels: Tensor) -> float:
    """Returns how often the judge takes a real nine for one, itself left out."""
    rows = (labels == NEW).nonzero().flatten()
    _, index = nearest(images[rows].flatten(1), images.flatten(1), exclude=rows)
    return float((labels[index] == NEW).float().mean())


def sample(out: Path, bank: Path, name: str, seed: int, *more: str) -> Tensor:
    """Samples the run with a bank and returns the images."""
    target = out / f"samples-{name}"
    if not target.exists():
        how = ["--num", "500", "--steps", "10", "--sampler", "dpm++2m", "--seed", str(seed)]
        run("sample", out / "run", "--bank", bank, "--out", target, *how, *more)
    return open_source(target, 1).all()


def main() -> None:
    """Does all of it, or what is left of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out: Path = options.out
    everything = list(digits())
    images = torch.stack([s.image for s in everything])
    labels = torch.tensor([s.label for s in everything])
    bank, larger, smaller = (out / f"{n}.safetensors" for n in ("bank", "with-nines", "no-threes"))
    if not (out / "data").exists():
        write_folders(out, images, labels)
        run("prepare", out / "known", "--out", out / "data", "--size", "8", "--gray")
    if not bank.exists():
        run("bank", "build", out / "data", "--out", bank, "--encoder", "pixels")
    config = RunConfig(
        data=str(out / "data"),
        seed=options.seed,
        model=ModelConfig(width=64, depth=4, heads=2, patch=2),
        memory=MemoryConfig(str(bank)),
        train=TrainConfig(
            steps=options.steps, batch_size=64, learning_rate=2e-3, warmup_steps=60, ema_decay=0.995
        ),
    )
    (out / "run.yaml").write_text(dump(config))
    run("train", out / "run.yaml", "--out", out / "run")
    if not larger.exists():
        run("bank", "add", bank, out / "nines", "--out", larger, "--label", str(NEW))
    if not smaller.exists():
        run("bank", "remove", bank, "--label", str(GONE), "--out", smaller)
    before = sample(out, bank, "before", options.seed)
    nines = sample(out, larger, "nines", options.seed, "--snippets", "held-out")
    without = sample(out, smaller, "without-threes", options.seed)
    report(out, images, labels, {"before": before, "nines": nines, "without": without})


def report(out: Path, images: Tensor, labels: Tensor, samples: dict[str, Tensor]) -> None:
    """Prints the figures and writes a page with the pictures."""
    found = {name: shares(s, images, labels) for name, s in samples.items()}
    real = images[labels == NEW]
    net = PixelComponents.fit(real, 16)
    target = moments(net(real))
    near = {n: frechet_distance(moments(net(s)), target) for n, s in samples.items()}
    lines = [
        f"real nines taken for nines by the judge: {real_shares(images, labels):.3f}",
        f"nines among samples of the first bank: {found['before'][NEW]:.3f}, "
        f"of snippets of nines: {found['nines'][NEW]:.3f}",
        f"fd_pixels16 to the real nines: {near['before']:.3f} before, {near['nines']:.3f} of their "
        "snippets",
        f"threes among samples of the first bank: {found['before'][GONE]:.3f}, "
        f"of the bank without them: {found['without'][GONE]:.3f}",
    ]
    print("\n".join(lines))
    titles = {
        "before": "The bank it was trained with",
        "nines": "Snippets of nines, which the network never saw",
        "without": "The bank without its threes",
    }
    sections = [
        Section(titles[name], "", image_grid(s[:48], columns=16, scale=5))
        for name, s in samples.items()
    ]
    html = page("A bank is edited, a network is not", "\n\n".join(lines), sections)
    save_page(out / "report.html", html)


if __name__ == "__main__":
    main()
