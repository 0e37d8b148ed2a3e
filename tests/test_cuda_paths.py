"""What runs on a GPU, run on a pretended one: no tensor of the wrong device, no wait but the known.

See `pretended_gpu` for what that proves. Two things it cannot follow: autocast's own rules for
CUDA, which are followed here on tensors without content (torch's FakeTensorMode), and the graphs of
torch.compile, which are counted on the CPU. Stood in for besides: the rate of a matrix product,
which would take a CPU minutes at a GPU's size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pretended_gpu import GPU, Gpu, on_gpu, pretend
from stratagem.autoencoders import Finish, KLAutoencoder
from stratagem.batches import Batch
from stratagem.checkpoint import load
from stratagem.clustering.affinity import gradient_affinity
from stratagem.clustering.optimal_denoiser import OptimalDenoiser
from stratagem.clustering.similarity import similarity
from stratagem.config import (
    AlignConfig,
    DiffusionConfig,
    MemoryConfig,
    ModelConfig,
    RunConfig,
    StagesConfig,
    UNetModelConfig,
)
from stratagem.data.images import to_float
from stratagem.data.latents import Statistics as LatentStatistics
from stratagem.data.shards import DataSet
from stratagem.distributed import World
from stratagem.encoders import ModuleEncoder, Preprocessing
from stratagem.errors import NonFinite
from stratagem.metrics.diversity import diversity
from stratagem.metrics.features import Components, EncoderFeatures
from stratagem.metrics.frechet import bootstrap, frechet_distance, moments
from stratagem.metrics.inception import _like_tensorflow
from stratagem.metrics.inception_score import class_sums, inception_score
from stratagem.metrics.kernel import kid
from stratagem.metrics.memorisation import Vectors, audit_vectors
from stratagem.metrics.neighbours import neighbour_scores
from stratagem.metrics.summary import Wanted, summarise
from stratagem.prefetch import Prefetch, to_device
from stratagem.programs import bench
from stratagem.programs.bench import _untrained, bench_sample, bench_train
from stratagem.programs.blank import Blank, blank_parts, sized_inputs
from stratagem.programs.machine import tf32
from stratagem.programs.sample import SampleConfig, sample_run
from stratagem.programs.solvers import SamplerName
from stratagem.programs.train import train
from stratagem.randomness import normal
from stratagem.schedule import Linear, _sqrt_linear_knots
from stratagem.stage_draw import StageDraw
from stratagem.stopping import Finite
from stratagem.train import TrainState, train_step
from stratagem.train_config import TrainConfig
from tolerances import FLOAT32, assert_near

SIZES = Blank(shape=(1, 8, 8), memory_dim=12, classes=5, token_dim=9)
TRAIN = TrainConfig(
    batch_size=12, threads=1, learning_rate=1e-3, ema_stds=(0.05, 0.1), precision="float32"
)
TRANSFORMER = ModelConfig(width=16, depth=2, heads=2, patch=4, labels=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    if torch.cuda.is_available():
        pytest.skip("has a real one")
    with pretend(monkeypatch) as gpu:
        yield gpu


# --- the pretended one itself --------------------------------------------------------------------


def test_it_refuses_mixtures_and_notes_waits(gpu: Gpu) -> None:
    there, here = torch.ones(3, device=GPU), torch.ones(3)
    assert (there.device, there.is_cuda) == (GPU, True)
    assert on_gpu(there + torch.tensor(2.0))
    for mix in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here @ there):
        with pytest.raises(AssertionError, match="mixes devices"):
            mix()
    with pytest.raises(AssertionError, match="numpy"):
        there.numpy()
    assert gpu.waits == []
    waits = {
        "to the GPU": lambda: here.to(GPU, non_blocking=True),  # not pinned
        "to the CPU": there.cpu,
        "_local_scalar_dense": lambda: float(there.sum()),
        "nonzero": there.nonzero,
        "index": lambda: there[there > 0],
        "tolist": there.tolist,
    }
    for name, wait in waits.items():
        wait()
        assert gpu.waits.pop() == name
    assert on_gpu(here.pin_memory().to(GPU, non_blocking=True))
    late = there.to("cpu", non_blocking=True)
    assert gpu.waits == []
    assert late.isnan().all()
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    assert torch.equal(late, here)


# --- training ------------------------------------------------------------------------------------


def unet(style: Any, **settings: Any) -> UNetModelConfig:
    return UNetModelConfig(
        style=style, width=8, mults=(1, 2), blocks=1, attention=(4,), norm_groups=4,
        head_width=4, **settings
    )  # fmt: skip


STAGED = StagesConfig(edges=(1.0, -1.0), shared=1)
MULTI = StagesConfig(edges=(1.0, -1.0), widths=(8, 8, 4))
MEMORY = MemoryConfig("nowhere", dropout=0.4)
RUNS: dict[str, dict[str, Any]] = {
    "all at once": {
        "model": dataclasses.replace(TRANSFORMER, depth=3),
        "memory": MEMORY,
        "stages": dataclasses.replace(STAGED, depths=(2, 1, 1), warm_steps=2, tie=0.5),
        "align": AlignConfig(block=1, hidden=8),
        "train": {"cosine_weight": 0.5, "condition_dropout": 0.2},
    },
    "bf16": {"memory": MEMORY, "stages": STAGED, "train": {"precision": "bf16"}},
    "dropout after": {"memory": MemoryConfig("nowhere", dropout=0.4, place="after", jitter=0.1)},
    "passes": {"stages": STAGED, "train": {"accumulate": 2, "activation_checkpointing": True}},
    "single": {
        "stages": dataclasses.replace(STAGED, batch="single", policy="uniform", unbiased=True),
        "diffusion": DiffusionConfig("vp", "x"),
    },
    "loss": {"stages": dataclasses.replace(STAGED, policy="loss", widths=(24, 16, 8))},
    "separate": {"stages": StagesConfig(edges=(1.0,), shared=0, form="separate")},
    "sit": {"model": dataclasses.replace(TRANSFORMER, style="sit", qk_norm=True)},
    "ddpm++": {"unet": unet("ddpm++", dropout=0.1), "memory": MEMORY},
    "ncsn++": {
        "unet": unet("ncsn++"),
        "stages": MULTI,
        "diffusion": DiffusionConfig("edm", "edm", "log-normal"),
    },
    "adm": {"unet": unet("adm", labels=True), "diffusion": DiffusionConfig("cosine", "x")},
    "ldm": {
        "unet": unet("ldm"),
        "stages": dataclasses.replace(MULTI, shared_middle=False),
        "diffusion": DiffusionConfig("sqrt-linear", "eps"),
    },
    "muon": {"train": {"optimizer": "muon"}},
}
# Once a run: sums of losses, and the table of a schedule. Muon: each step, see docs/scaling.md.
WAITS = {"loss": ["to the GPU"], "ldm": ["to the GPU"], "muon": 2 * ["_local_scalar_dense"]}


def run(name: str, **settings: Any) -> RunConfig:
    given = dict(RUNS[name])
    cfg = dataclasses.replace(TRAIN, **given.pop("train", {}), **settings)
    model = {} if "unet" in given else {"model": TRANSFORMER}
    return RunConfig(**{"data": "nowhere", "train": cfg, **model, **given})


def steps(
    config: RunConfig, device: torch.device, num: int
) -> tuple[TrainState, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    parts = blank_parts(config, SIZES)
    world, metrics = World(device=device), list[dict[str, Tensor]]()
    state = TrainState(parts.objective, config.train, parts.batches.stages, world=world, seed=3)
    if device.type == "cuda":
        Gpu.current.waits.clear()  # the weights went there
    with Prefetch(parts.batches, 0, num, device=device) as made:
        for _ in range(num):
            metrics.append(train_step(state, to_device(made.take(), device), config.train))
    return state, metrics


@pytest.mark.parametrize("name", RUNS)
def test_a_step_stays_on_the_gpu_and_is_that_of_the_cpu(gpu: Gpu, name: str) -> None:
    """Moments, averages and metrics are there; the host waits for none of them."""
    _sqrt_linear_knots.cache_clear()
    config, num = run(name), 3 if name == "all at once" else 2  # it ends its warm start
    state, metrics = steps(config, GPU, num)
    assert gpu.waits == WAITS.get(name, [])
    assert all(on_gpu(value) for line in metrics for value in line.values())
    weights = list(state.objective.parameters())
    averages = [a for group in state.ema.groups.values() for a in group.values()]
    moments_of = [m for p in weights for m in state.moments(p).values()]
    assert all(map(on_gpu, [*weights, *averages, *moments_of]))
    state.finite.settle()
    ours, cpu = state.checkpoint(), steps(config, torch.device("cpu"), num)[0].checkpoint()
    bound = 1e-3 if name in {"muon", "bf16"} else FLOAT32
    for group, tensors in cpu.tensors.items():
        for key, value in tensors.items():
            assert_near(ours.tensors[group][key].cpu(), value, bound)


def test_a_poisoned_step_moves_nothing_and_is_read_one_step_later(gpu: Gpu) -> None:
    config = run("dropout after", nonfinite="skip", nonfinite_limit=2)
    state, _ = steps(config, GPU, 2)
    batch = to_device(blank_parts(config, SIZES).batches(2), GPU)
    before = [p.value.clone() for p in state.objective.parameters()]
    gpu.waits.clear()
    for expected in (True, True):
        metrics = train_step(state, batch._replace(x=batch.x * torch.nan), config.train)
        assert gpu.waits == []
        assert gpu.late  # the verdict is on its way
        assert bool(metrics["skipped"].value) is expected
        for p, old in zip(state.objective.parameters(), before, strict=True):
            assert torch.equal(p.value, old)
    with pytest.raises(NonFinite, match=r"at step 3, .* \(2 steps in a row\)"):
        train_step(state, batch, config.train)


def test_a_run_ends_and_goes_on_there_and_here(
    gpu: Gpu, blobs: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole program: pictures, snapshots, log, checkpoints; then on from them on the CPU."""
    cfg = TrainConfig(
        steps=4, batch_size=8, device="cuda", precision="float32", threads=1, log_every=1,
        learning_rate=1e-3,
        checkpoint_every=2, ema_stds=(0.1,), ema_snapshot_every=2, samples_every=4,
    )  # fmt: skip
    config = RunConfig(
        data=str(blobs.path),
        model=TRANSFORMER,
        train=cfg,
        stages=StagesConfig(edges=(0.0,), shared=1),
    )
    state = train(config, tmp_path / "there")
    assert on_gpu(state.ema.weights["encoder.embed.weight"])
    for device in ("cpu", "cuda"):
        longer = dataclasses.replace(config, train=dataclasses.replace(cfg, steps=6, device=device))
        whole = train(longer, tmp_path / device)
        on = train(longer, tmp_path / "there") if device == "cuda" else whole
    assert on.step == 6
    found, reference = (load(tmp_path / place, 6) for place in ("there", "cpu"))
    for group, tensors in reference.tensors.items():
        for key, value in tensors.items():
            assert_near(found.tensors[group][key], value, FLOAT32)
    assert len(list((tmp_path / "there" / "samples").glob("*.png"))) == 2


def test_targets_made_on_the_gpu_stay_there(gpu: Gpu) -> None:
    x, there = torch.zeros(2, 1, 2, 2), torch.ones(2, 3, 4, device=GPU)
    batch = Batch(torch.arange(2), x, x, torch.zeros(2), {"align": there})
    with Prefetch(lambda _: batch, 0, 1, device=GPU) as made:
        taken = to_device(made.take(), GPU)
    assert taken.condition["align"] is there
    assert on_gpu(taken.eps)
    assert not on_gpu(taken.ids)
    assert gpu.waits == []


@pytest.mark.skipif(torch.version.cuda is None, reason="fake tensors need a build with CUDA")
@pytest.mark.parametrize("name", ["all at once", "bf16", "sit", "adm", "ncsn++", "ldm"])
def test_the_rules_of_cuda_autocast_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and types alone, on tensors of "cuda" without content; losses come out in float32."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    parts = blank_parts(run(name), SIZES)
    batch = parts.batches(0)
    with FakeTensorMode(), torch.inference_mode():

        def there(value: Tensor) -> Tensor:
            return torch.empty(value.shape, dtype=value.dtype, device="cuda")

        for part in parts.objective.modules():
            for table in (part._parameters, part._buffers):
                table.update({k: v if v is None else there(v) for k, v in table.items()})
        told = {name: there(value) for name, value in batch.condition.items()}
        seen = set[torch.dtype]()
        for part in parts.objective.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                part.register_forward_hook(lambda *a: seen.add(a[2].dtype))
        with torch.autocast("cuda", torch.bfloat16):
            x, eps, t = map(there, (batch.x, batch.eps, batch.t))
            losses = parts.objective(x, eps, t, stage=batch.stage, **told)
    assert seen == {torch.bfloat16}
    for part in losses:
        assert part is None or (part.device.type, part.dtype) == ("cuda", torch.float32)


# --- torch.compile -------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_that_change_make_no_new_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each kind of block one graph for its first number of rows, one for any, one for 1 row."""
    graphs = list[torch.fx.GraphModule]()
    compiled = torch.compile

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda call: compiled(call, backend=count))
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 4)  # torch's is 8, for U-Nets
    config = run("loss", compile=True)
    parts = blank_parts(config, SIZES)
    draw = parts.batches.stages
    assert isinstance(draw, StageDraw)
    assert draw.history is not None
    state = TrainState(parts.objective, config.train, draw)
    numbers = []
    for step, rows in enumerate(
        [(4, 4, 4), (6, 4, 2), (1, 10, 1), (10, 1, 1), (2, 3, 7), (5, 2, 5)]
    ):
        shares = tuple(n / 12 for n in rows)
        monkeypatch.setattr(draw.history, "shares", lambda _, shares=shares: shares)
        batch = parts.batches(step)
        assert batch.counts == rows
        train_step(state, batch, config.train)
        numbers.append(len(graphs))
    kinds = 4  # the encoder's block, and those of three widths
    assert 4 < numbers[-1] <= 3 * kinds  # beyond the limit blocks would run as they are
    assert numbers[-2:] == 2 * [numbers[3]]
    torch._dynamo.reset()


# --- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*get_args(SamplerName), "churn"])
def test_sampling_waits_twice_a_batch_and_once_for_noise(gpu: Gpu, name: str) -> None:
    """For the start and the result, whatever the calls: times and stages are the host's."""
    config = run("all at once")
    churn = {"churn": 4.0} if name == "churn" else {}
    cfg = SampleConfig(
        3, 1, "heun-edm" if churn else name, 7, guidance=2.0, guide_from=0.3, batch_size=3, **churn
    )  # fmt: skip
    torch.manual_seed(0)
    model = _untrained(config, sized_inputs(config, SIZES))
    expected = sample_run(model, cfg).images
    model.denoiser.to(GPU)
    calls = list[bool]()
    note = model.denoiser.register_forward_hook(
        lambda *_: calls.append(torch.backends.cuda.matmul.allow_tf32)
    )
    gpu.waits.clear()
    found = sample_run(model, cfg).images
    note.remove()
    noisy = 6 if name in {"euler-maruyama", "heun-sde", "churn"} else 0
    assert gpu.waits == ["to the GPU"] * (3 + noisy) + ["to the CPU"]  # snippets, classes, start
    assert len(calls) >= 7
    assert all(calls)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert (found.int() - expected.int()).abs().max() <= 1


def test_products_are_as_before_after_an_error() -> None:
    with pytest.raises(KeyError), tf32():
        raise KeyError
    assert not torch.backends.cuda.matmul.allow_tf32


class Doubling(nn.Module):
    """Stands for diffusers' network: its latents are means of 2 x 2 pixels."""

    config = SimpleNamespace(latent_channels=3, block_out_channels=(1, 1))

    def encode(self, x: Tensor) -> Any:
        mean = nn.functional.avg_pool2d(x, 2)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=mean.exp()))

    def decode(self, z: Tensor) -> Any:
        return SimpleNamespace(sample=nn.functional.interpolate(z, scale_factor=2))


def test_the_ends_of_sampling_are_there(gpu: Gpu) -> None:
    frozen = KLAutoencoder(Doubling(), "doubling", GPU)
    posterior = frozen.encode(torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8))
    assert not on_gpu(posterior.mean)
    finish = Finish((3, 16, 16), LatentStatistics([0.1] * 3, [0.5] * 3), frozen)
    x = posterior.mean.float()
    made = finish(x.to(GPU))
    assert on_gpu(made)
    assert torch.equal(made.cpu(), finish(x))


@pytest.mark.slow
def test_bench_measures_there(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its counting too: MACs are those of the meta device."""
    monkeypatch.setattr(bench, "product_rate", lambda *_: 1e12)
    config = run("all at once", device="cuda", precision="bf16", log_every=2)
    speed = bench_train(config, SIZES, seconds=0.0)
    assert (speed.device, speed.sheet) == ("NVIDIA H200", 989e12)
    assert speed.peak_bytes == 1 << 30
    how = SampleConfig(sampler="heun", steps=2, batch_size=4)
    assert bench_sample(config, how, SIZES, seconds=0.0).calls == 3


# --- all else that takes a device ----------------------------------------------------------------


@pytest.mark.parametrize("memory", [False, True])
def test_agreement_of_optimal_denoisers(gpu: Gpu, memory: bool) -> None:
    data = normal((20, 1, 4, 4), 1, "data")
    told = normal((20, 6), 2, "memory") if memory else None
    times = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    found, reference = (
        similarity(
            OptimalDenoiser(data, Linear(), memory=told, device=device),
            times,
            num_samples=4,
            eta=0.1,
            seed=0,
        )
        for device in (GPU, "cpu")
    )
    for ours, theirs in zip(
        dataclasses.astuple(found), dataclasses.astuple(reference), strict=True
    ):
        assert_near(ours, theirs, FLOAT32)


@pytest.mark.parametrize("width", [8, 1 << 16])
def test_agreement_of_gradients(gpu: Gpu, width: int) -> None:
    """Kept whole, and as count sketches."""
    net, x = nn.Linear(6, 5), normal((4, 6), 1, "x")
    found = []
    for device in (torch.device("cpu"), GPU):
        net, rows = net.to(device), x.to(device)
        found.append(
            gradient_affinity(
                lambda k, b, net=net, rows=rows: (net(rows * (k + 1)) ** (b + 2)).mean(),
                list(net.parameters()),
                num_times=3,
                num_batches=2,
                width=width,
            )
        )
    assert not on_gpu(found[1])
    assert_near(found[1], found[0], FLOAT32)


class Tokens(nn.Module):
    """Four patches and a class token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        patches = (
            x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        )
        tokens = self.map(patches)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)


def test_encoders_and_metrics(gpu: Gpu) -> None:
    """Features may stay on the GPU through every metric; each gives the CPU's figures."""
    images = torch.randint(256, (48, 1, 8, 8), dtype=torch.uint8)
    real = torch.randint(256, (48, 1, 8, 8), dtype=torch.uint8)
    there, here = (
        ModuleEncoder(Tokens(), "tokens", Preprocessing(4), pool="cls-patch-mean", device=device)
        for device in (GPU, "cpu")
    )
    assert there.description() == here.description()
    assert on_gpu(there.tokens(images, 3))
    assert_near(there.tokens(images, 3).cpu(), here.tokens(images, 3), FLOAT32)
    vectors = here(images)
    net = EncoderFeatures(there, Components.fit(vectors, 3))
    summary = summarise(images.split(20), net, Wanted(rows=True))
    assert summary.rows is not None
    assert not on_gpu(summary.rows)
    assert not on_gpu(summary.pooled.cov)
    a, b = vectors[:, :4], here(real)[:, :4]
    figures = []
    for fake, true in ((a, b), (a.to(GPU), b.to(GPU))):
        reference = moments(true)
        p = fake.softmax(1)
        figures.append(
            [
                frechet_distance(moments(fake), reference),
                *bootstrap(fake, moments(b), 2),
                *kid(fake, true),
                *neighbour_scores(true, fake, 3),
                *inception_score(class_sums(p, 0, len(p))),
                *(diversity(fake, torch.arange(48, device=fake.device) // 4) or ()),
            ]
        )
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)
    assert on_gpu(_like_tensorflow(to_float(images[:1].to(GPU))))


def test_copies_are_found_there(gpu: Gpu) -> None:
    """Training images on the host, as they lie on disk, and all else on the GPU."""
    samples, held_out, known = (normal((1, n, 5), n, "rows") for n in (30, 25, 60))
    found, reference = (
        audit_vectors(
            Vectors(samples.to(device), held_out.to(device), known[0], lambda i: known[:, i])
        )
        for device in (GPU, torch.device("cpu"))
    )
    assert_near(found.distances, reference.distances, FLOAT32)
    assert found.authentic == reference.authentic
    assert found.score == pytest.approx(reference.score, rel=1e-6)


def test_a_verdict_is_not_read_before_it_is_there(gpu: Gpu) -> None:
    finite = Finite(1, GPU)
    one = torch.ones((), device=GPU)
    finite.judge(0, torch.arange(1), one, one)
    assert torch.stack([v.numbers for v in finite._verdicts]).isnan().all()
    finite.settle()  # NaN would end the run
    assert gpu.waits == []
