"""Averages follow their formulas; mixtures of them are as near as the bound on them says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stratagem.assemble import open_run
from stratagem.checkpoint import SNAPSHOTS, Checkpoint, list_steps, load, save
from stratagem.cli import main
from stratagem.config import ModelConfig, RunConfig, StagesConfig, parse
from stratagem.data.shards import DataSet
from stratagem.ema import WIDEST, Ema, Mixture, Profile, gamma_of, group_of, mix, std_of
from stratagem.errors import DamagedArtifact, InputError
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.nets.warm_start import origins
from stratagem.post_hoc import average_of
from stratagem.programs.train import train
from stratagem.train_config import TrainConfig
from tolerances import FLOAT32, FLOAT64

STDS = (0.05, 0.1)


def test_formulas() -> None:
    """Of both kinds, in float64 beside; the power function's shape is tau^gamma."""
    net = nn.Linear(3, 2)
    ema = Ema(net, 0.9, [0.1])
    expected = {name: p.detach().double() for name, p in net.named_parameters()}
    path = {name: list[Tensor]() for name in expected}
    for step in range(1, 200):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * step)
        ema.update(step)
        beta = min(0.9, (1 + step) / (10 + step))
        for name, p in net.named_parameters():
            expected[name] = beta * expected[name] + (1 - beta) * p.detach().double()
            path[name].append(p.detach().double())
    edges = (torch.arange(200).double() / 199) ** (gamma_of(0.1) + 1)
    for name, average in ema.state_dict()["ema"].items():
        torch.testing.assert_close(average.double(), expected[name], rtol=FLOAT32, atol=FLOAT32)
        shaped = torch.einsum("t,t...->...", edges.diff(), torch.stack(path[name]))
        power = ema.state_dict()["ema-0.1"][name].double()
        torch.testing.assert_close(power, shaped, rtol=FLOAT32, atol=FLOAT32)
        assert not torch.allclose(average, dict(net.named_parameters())[name])


def test_averages_are_float32_and_apart_from_the_weights() -> None:
    net = nn.Linear(3, 2).to(torch.bfloat16)
    ema = Ema(net, 0.5, STDS)
    assert list(ema.groups) == ["ema", "ema-0.05", "ema-0.1"]
    assert all(a.dtype == torch.float32 for named in ema.groups.values() for a in named.values())
    with torch.no_grad():
        net.weight.zero_()
    assert ema.weights["weight"].abs().sum() > 0
    ema.update(1)
    assert ema.groups["ema-0.05"]["weight"].abs().sum() == 0  # of one step: that step


def test_state_round_trip() -> None:
    net, other = nn.Linear(3, 2), nn.Linear(3, 2)
    ema, again = Ema(net, 0.5, STDS), Ema(other, 0.5, STDS)
    again.load_state_dict(ema.state_dict())
    for group, named in ema.groups.items():
        assert all(torch.equal(again.groups[group][n], named[n]) for n in named)
    with pytest.raises(KeyError):
        again.load_state_dict({"ema": ema.weights})


def test_gamma_and_std_are_inverse() -> None:
    for std in (1e-3, 0.01, 0.05, 0.1, 0.2, 0.28, WIDEST):
        assert std_of(gamma_of(std)) == pytest.approx(std, rel=FLOAT64)
    for gamma in (0.0, 0.5, 6.94, 16.97, 900.0):
        assert gamma_of(std_of(gamma)) == pytest.approx(gamma, rel=FLOAT64, abs=1e-7)
    for std in (0.05, 0.2):  # the definition: standard deviation of the density over its length
        tau = (np.arange(100_000) + 0.5) / 100_000
        p = tau ** gamma_of(std) / (tau ** gamma_of(std)).sum()
        mean = (p * tau).sum()
        assert ((p * (tau - mean) ** 2).sum()) ** 0.5 == pytest.approx(std, rel=1e-6)
    for std in (0.0, -0.1, WIDEST + 1e-6):
        with pytest.raises(ValueError, match="relative standard deviation"):
            gamma_of(std)


def averages(path: np.ndarray, std: float) -> np.ndarray:
    """The tracked average after every step of a path of weights (T, ...), in float64."""
    found, average = [], np.zeros(path.shape[1:])
    for step, weights in enumerate(path, 1):
        beta = (1 - 1 / step) ** (gamma_of(std) + 1)
        average = beta * average + (1 - beta) * weights
        found.append(average)
    return np.array(found)


def mixed(path: np.ndarray, every: int, wanted: float) -> tuple[np.ndarray, Mixture]:
    """An average of the whole path, mixed of snapshots."""
    steps = [*range(every, len(path), every), len(path)]
    tracked = [Profile(step, std) for step in steps for std in STDS]
    mixture = mix(tracked, Profile(len(path), wanted))
    found = {std: averages(path, std) for std in STDS}
    parts = [c * found[p.std][p.step - 1] for c, p in zip(mixture.weights, tracked, strict=True)]
    return sum(parts, np.zeros(path.shape[1:])), mixture


def shape(profile: Profile, length: int) -> np.ndarray:
    """What each of the steps 1, ..., length counts in an average, float64."""
    reach = np.minimum(np.arange(length + 1) / profile.step, 1)
    return np.diff(reach ** (gamma_of(profile.std) + 1))


def bound(path: np.ndarray, wanted: float, error: float) -> np.ndarray:
    """|sum_i c_i p_i - p| |path - line|: how far a mixture is off at most (Cauchy, Schwarz)."""
    line = np.stack([np.ones(len(path)), np.arange(len(path))], 1)
    off_line = path - line @ np.linalg.lstsq(line, path)[0]
    a = gamma_of(wanted) + 1
    length = a / ((2 * a - 1) * len(path)) ** 0.5  # |p|
    return error * length * np.linalg.norm(off_line, axis=0)


@pytest.mark.parametrize("every", [15, 60, 250])
@pytest.mark.parametrize("wanted", [0.03, 0.07, 0.15, 0.2])
def test_a_mixture_is_as_near_to_the_tracked_average_as_its_error_says(
    every: int, wanted: float
) -> None:
    """On random walks, and on the worst path, along which the weights follow the error itself."""
    walks = np.random.default_rng(0).normal(size=(500, 40)).cumsum(0) + 7.0
    weights, error = mixed(walks, every, wanted)[1]
    tracked = [Profile(s, std) for s in (*range(every, 500, every), 500) for std in STDS]
    shapes = [c * shape(p, 500) for c, p in zip(weights, tracked, strict=True)]
    worst = sum(shapes) - shape(Profile(500, wanted), 500)
    path = np.concatenate([walks, worst[:, None]], 1)
    off = np.abs(mixed(path, every, wanted)[0] - averages(path, wanted)[-1])
    most = bound(path, wanted, error)
    assert (off <= most + FLOAT64).all()
    assert off[-1] > 0.8 * most[-1]
    if every == 15:
        nearest = min(STDS, key=lambda std: abs(std - wanted))
        apart = np.abs(averages(walks, nearest)[-1] - averages(walks, wanted)[-1])
        assert off[:-1].mean() < apart.mean() / 10


@pytest.mark.parametrize("wanted", [0.03, 0.07, 0.15, 0.25])
def test_mixtures_are_exact_on_lines_and_their_weights_sum_to_1(wanted: float) -> None:
    path = 3.0 - 0.25 * np.arange(1, 401.0)[:, None]
    found, mixture = mixed(path, 80, wanted)
    assert sum(mixture.weights) == pytest.approx(1, abs=FLOAT64)
    assert found == pytest.approx(averages(path, wanted)[-1], rel=FLOAT64)
    assert mixture.error > 1e-4  # which is not why


def test_a_tracked_average_is_a_mixture_of_itself() -> None:
    for every in (50, 400):
        weights, error = mixed(np.zeros((400, 1)), every, 0.1)[1]
        assert weights[-1] == pytest.approx(1, abs=1e-6)
        assert np.abs(weights[:-1]).max() < 1e-6
        assert error < 1e-6


@pytest.fixture(scope="module")
def config(blobs: DataSet) -> RunConfig:
    """Two stages whose decoders part at step 9, all averages, snapshots every 4 steps."""
    return RunConfig(
        data=str(blobs.path),
        seed=5,
        model=ModelConfig(width=16, depth=3, heads=2, patch=2, labels=True),
        stages=StagesConfig(edges=(0.0,), shared=1, depths=(2, 1), warm_steps=9),
        train=TrainConfig(
            steps=24,
            batch_size=8,
            learning_rate=3e-3,
            ema_decay=0.9,
            ema_stds=(*STDS, 0.07),
            ema_snapshot_every=4,
            checkpoint_every=1,
            keep_checkpoints=0,
            threads=1,
        ),
    )


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("averages") / "run"
    train(config, out)
    return out


def spread(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def network(run: Path) -> MultiDecoder:
    backbone = open_run(run).denoiser.backbone
    assert isinstance(backbone, MultiDecoder)
    return backbone


@pytest.mark.parametrize("step", [7, 14, 24])
def test_a_run_gives_averages_that_it_did_not_track(run: Path, step: int) -> None:
    """0.07 is tracked too, so that the mixture of the others can be held against it.

    The weights of every step were saved, so that the bound is known; but for decoder 1, which
    before the warm start's end followed nobody.
    """
    saved, backbone = load(run, step), network(run)
    found = dict(average_of(run, saved, STDS, 0.07, backbone, 9))
    tracked, plain = (dict(saved.tensors[group_of(std)]) for std in (0.07, 0.05))
    before = [s for s in list_steps(run, SNAPSHOTS) if s < step]
    profiles = [Profile(s, std) for s in (*before, step) for std in STDS]
    error = mix(profiles, Profile(step, 0.07)).error
    models = [load(run, s).tensors["model"] for s in range(1, step + 1)]
    for name in (n for n in found if not n.startswith("decoders.1.")):
        path = np.stack([model[name].double().flatten().numpy() for model in models])
        off = (found[name] - tracked[name]).abs().flatten().numpy()
        assert (off <= bound(path, 0.07, error) + FLOAT32).all(), name
    assert spread(found, tracked) < 0.3 * spread(plain, tracked)
    assert spread(dict(average_of(run, saved, STDS, 0.05, backbone, 9)), plain) == 0


def test_the_warm_start_parts_all_averages(run: Path, config: RunConfig) -> None:
    """At its end, decoder 1's averages are those of decoder 0, but for one step."""
    saved, net = load(run, 10), network(run)
    for std in config.train.ema_stds:
        average = dict(saved.tensors[group_of(std)])
        made = {n: o.make(average) for n, o in origins(net, 0).items() if o.copied is not None}
        assert len(made) > 5
        before = load(run, 8).tensors[group_of(std)]
        moved = [n for n in made if (before[n] - made[n]).norm() > 0.1]
        assert moved
        for name in moved:
            assert (average[name] - made[name]).norm() < (before[name] - made[name]).norm() / 10


def test_stopped_and_continued_makes_the_same_averages_and_snapshots(
    run: Path, config: RunConfig, tmp_path: Path
) -> None:
    parts = tmp_path / "run"
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, checkpoint_every=7)
    )

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 13:  # past the checkpoint of step 7 and the snapshots of 8 and 12
            raise Stop

    with pytest.raises(Stop):
        train(config, parts, progress=stop)
    assert list_steps(parts) == [7]
    assert list_steps(parts, SNAPSHOTS) == [4, 8, 12]
    train(config, parts)
    assert list_steps(parts, SNAPSHOTS) == [4, 8, 12, 16, 20, 24]
    names = [p.relative_to(parts) for p in parts.rglob("ema*.safetensors")]
    assert len(names) == 4 * 4 + 3 * 6
    for name in names:
        assert (parts / name).read_bytes() == (run / name).read_bytes(), name


def test_a_prolonged_run_has_no_snapshot_out_of_step(config: RunConfig, tmp_path: Path) -> None:
    short = dataclasses.replace(config.train, steps=10)
    train(dataclasses.replace(config, train=short), tmp_path / "run")
    assert list_steps(tmp_path / "run", SNAPSHOTS) == [4, 8]


def test_wrong_uses_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--ema-std 0\.001: 5 snapshots .* error of"):
        open_run(run, ema_std=0.001)
    with pytest.raises(InputError, match=r"at most 0\.289"):
        open_run(run, ema_std=0.4)
    backbone = nn.Linear(1, 1)
    lone = Checkpoint(4, {group_of(0.1): {}, "ema": {}}, {})
    with pytest.raises(InputError, match="two averages"):
        average_of(tmp_path, lone, [0.1], 0.07, backbone)
    with pytest.raises(InputError, match=r"tracks train\.ema_stds \[\]"):
        average_of(tmp_path, lone, [], 0.07, backbone)
    torn = {group_of(std): {"w": torch.ones(3)} for std in STDS}
    path = save(tmp_path, Checkpoint(2, torn, {}), place=SNAPSHOTS)
    (path / "ema-0.1.safetensors").write_bytes(b"")
    now = Checkpoint(4, {**torn, "ema": {"w": torch.ones(3)}}, {})
    with pytest.raises(DamagedArtifact, match=r"ema-0\.1"):
        average_of(tmp_path, now, STDS, 0.09, backbone)
    for body, message in [
        ({"ema_stds": [0.3]}, "has 0.3"),
        ({"ema_stds": [0.1, 0.1]}, "twice"),
        ({"ema_snapshot_every": 5}, "without train.ema_stds"),
    ]:
        with pytest.raises(InputError, match=message):
            parse({"data": "x", "train": body})


def test_sampling_takes_the_average_that_is_asked_for(run: Path, tmp_path: Path) -> None:
    line = ["sample", str(run), "--num", "4", "--steps", "2", "--ema-std"]
    assert main([*line, "0.06", "--out", str(tmp_path / "a")]) == 0
    assert main([*line, "0.01", "--out", str(tmp_path / "b")]) == 2
    other, plain = open_run(run, ema_std=0.06), open_run(run)
    assert (other.ema_std, plain.ema_std) == (0.06, None)
    weights = (dict(m.denoiser.backbone.named_parameters()) for m in (other, plain))
    assert spread(*weights) > 1e-4
