"""`stratagem bench`: what it counts is right, what it measures adds up, and the loop passes."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stratagem.cli import main
from stratagem.config import (
    AlignConfig,
    MemoryConfig,
    ModelConfig,
    RunConfig,
    StagesConfig,
    dump,
    load,
)
from stratagem.data.shards import DataSet
from stratagem.errors import InputError
from stratagem.nets.cost import macs
from stratagem.programs.bench import SampleSpeed, Speed, bench_sample, bench_train
from stratagem.programs.blank import Blank, blank_parts, sized_inputs
from stratagem.programs.sample import SampleConfig
from stratagem.stopping import Finite
from stratagem.train import TrainState, train_step
from stratagem.train_config import TrainConfig

PRESETS = Path(__file__).parents[1] / "examples" / "presets"
SIZES = Blank(shape=(1, 8, 8), memory_dim=12, classes=5, token_dim=9)


@pytest.fixture
def config() -> RunConfig:
    return RunConfig(
        data="nowhere",
        model=ModelConfig(width=16, depth=3, heads=2, patch=4, labels=True),
        memory=MemoryConfig("nowhere", dropout=0.4),
        stages=StagesConfig(edges=(1.0, -1.0), shared=1, depths=(2, 1, 1), warm_steps=2),
        align=AlignConfig(block=1, hidden=8),
        train=TrainConfig(batch_size=8, threads=1, log_every=3),
    )


def test_training_is_measured(config: RunConfig) -> None:
    turns: list[tuple[int, int]] = []
    speed = bench_train(config, SIZES, seconds=0.5, progress=lambda *done: turns.append(done))
    assert isinstance(speed, Speed)
    assert turns[-1][0] == turns[-1][1]
    assert config.stages is not None
    warm = dataclasses.replace(config.stages, warm_steps=0)  # only what comes after it counts
    parts = blank_parts(dataclasses.replace(config, stages=warm), SIZES)
    batch = parts.batches(0)
    expected = macs(
        parts.objective, batch.x, batch.eps, batch.t, stage=batch.stage, **batch.condition
    )
    assert speed.macs == expected / 8
    assert speed.parameters == sum(p.numel() for p in parts.objective.parameters())
    ms = speed.milliseconds
    of_the_loop = sum(ms[name] for name in ms.keys() - {"data"})
    assert of_the_loop == pytest.approx(1000 * 8 / speed.images_per_second)
    assert speed.ratio == pytest.approx(
        speed.images_per_second / speed.bare_images_per_second, rel=0.5
    )
    assert speed.mfu == pytest.approx(6 * speed.macs * speed.images_per_second / speed.peak)
    assert 0 < speed.mfu < 1
    assert speed.sheet is None
    assert speed.peak_bytes > 2**20
    assert speed.precision == "float32"


def test_sampling_is_measured(config: RunConfig) -> None:
    how = SampleConfig(sampler="heun", steps=3, batch_size=4)
    speed = bench_sample(config, how, SIZES, seconds=0.2)
    assert isinstance(speed, SampleSpeed)
    assert speed.calls == 5  # the last of three steps is Euler's
    assert 0 < speed.mfu < 1
    assert 0.1 < speed.network_share < 1.3
    assert speed.images_per_second > 0


def test_what_is_there_is_used_and_what_is_not_has_the_sizes_given(
    config: RunConfig, blobs: DataSet
) -> None:
    inputs = sized_inputs(config, SIZES)
    assert inputs.bank is not None
    assert (inputs.data.shape, inputs.bank.dim, len(inputs.data.classes)) == ((1, 8, 8), 12, 5)
    latents = sized_inputs(config, dataclasses.replace(SIZES, shape=(4, 8, 8))).data
    assert latents.kind == "latents"
    ids, flip = torch.tensor([3, 5]), torch.tensor([False, True])
    assert latents.sample(ids, flip, lambda: torch.zeros(2, 4, 8, 8)).shape == (2, 4, 8, 8)
    plain = dataclasses.replace(config, data=str(blobs.path), memory=None, align=None)
    assert sized_inputs(plain, Blank()).data.fingerprint == blobs.fingerprint
    for change, message in [
        ({}, r"no data at nowhere: give the size"),
        ({"stages": StagesConfig("nowhere.json", shared=1)}, r"stages\.file nowhere\.json"),
    ]:
        with pytest.raises(InputError, match=message):
            sized_inputs(dataclasses.replace(config, **change), Blank() if not change else SIZES)


def test_what_cannot_be_measured_is_refused(config: RunConfig) -> None:
    single = dataclasses.replace(
        config, stages=StagesConfig(edges=(1.0,), shared=1, batch="single")
    )
    passes = dataclasses.replace(config, train=TrainConfig(accumulate=2))
    for wrong, message in [(single, "stages.batch=mixed"), (passes, "train.accumulate=1")]:
        with pytest.raises(InputError, match=message):
            bench_train(wrong, SIZES)


def test_the_program_prints_both(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(dump(config))
    sizes = ["--shape", "1", "8", "8", "--memory-dim", "12", "--classes", "5", "--seconds", "0.1"]
    setting = ["--set", "train.batch_size=4"]
    assert main(["bench", "train", str(file), str(file), *sizes, *setting]) == 0
    said = capsys.readouterr().out
    assert said.count("of bare forward, backward and AdamW") == 2
    assert "batches of 4" in said
    assert main(["bench", "train", str(file), *sizes, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[str(file)]["batch_size"] == 8
    how = ["--sampler", "euler", "--steps", "2", "--batch-size", "3"]
    assert main(["bench", "sample", str(file), *sizes, *how]) == 0
    assert "3 images at once, 2 calls each" in capsys.readouterr().out
    assert main(["bench", "sample", str(file), *sizes, *how, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[str(file)]["calls"] == 2
    assert main(["bench", "train"]) == 2
    assert main(["bench"]) == 2
    assert "configuration" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gmem-xl-sde", "gmem-b-sde", "cifar10-ncsnpp-multistage"])
def test_presets_have_what_a_bench_needs(name: str) -> None:
    """Published configurations need a shape and nothing else."""
    config = load(PRESETS / f"{name}.yaml")
    shape = (3, 32, 32) if "cifar" in name else (32, 16, 16)
    inputs = sized_inputs(config, Blank(shape=shape))
    assert inputs.data.shape == shape
    assert (inputs.bank is not None) == (config.memory is not None)


class Counted(TorchDispatchMode):
    """Counts torch's operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Notes the operation and lets it happen."""
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(config: RunConfig, *, depth: int, bare: bool) -> Counter[str]:
    """What the fifth step of the loop calls, or the same step without the loop."""
    assert isinstance(config.model, ModelConfig)
    model = dataclasses.replace(config.model, depth=depth)
    parts = blank_parts(dataclasses.replace(config, model=model), SIZES)
    state = TrainState(parts.objective, config.train, parts.batches.stages)
    state.finite = Finite(1, torch.device("cpu"), lag=1)  # as on a device
    adamw = torch.optim.AdamW(parts.objective.parameters(), fused=True)
    for step in range(5):
        batch = parts.batches(step)
        with Counted() as counted:
            if bare:
                losses = parts.objective(batch.x, batch.eps, batch.t, **batch.condition)
                losses.denoise.mean().backward()
                adamw.step()
                adamw.zero_grad()
            else:
                train_step(state, batch, config.train)
    return counted.found


def test_the_loop_adds_the_same_few_operations_whatever_the_network(config: RunConfig) -> None:
    """Its cost beside a large network's is none: nothing of it is done once per layer."""
    config = dataclasses.replace(config, stages=None, align=None)
    added = {
        depth: operations(config, depth=depth, bare=False)
        - operations(config, depth=depth, bare=True)
        for depth in (2, 5)
    }
    assert added[2] == added[5]
    assert added[5].total() <= 40
    assert "_local_scalar_dense" not in added[5]  # the host waits for nothing
    assert operations(config, depth=5, bare=True).total() > 5 * added[5].total()
