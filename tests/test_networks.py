"""Networks of a configuration: U-Nets, the forms of stages, and the presets of published ones."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from stratagem.assemble import assemble, open_run
from stratagem.checkpoint import list_steps, load
from stratagem.cli import main
from stratagem.config import (
    AlignConfig,
    DiffusionConfig,
    MemoryConfig,
    ModelConfig,
    RunConfig,
    StagesConfig,
    UNetModelConfig,
)
from stratagem.config import load as load_config
from stratagem.data.shards import DataSet
from stratagem.errors import InputError
from stratagem.memory.bank import MemoryBank
from stratagem.memory.store import hold
from stratagem.nets.cost import macs, parameters
from stratagem.nets.multi_decoder import MultiDecoder, PassOn, Whole
from stratagem.nets.transformer import TransformerDecoder
from stratagem.nets.unet_style import STYLES
from stratagem.networks import condition_width, make_backbone, unet_style
from stratagem.programs.cost import cost_of
from stratagem.programs.sample import SampleConfig, sample_run
from stratagem.programs.train import train
from stratagem.schedule import EDM, VP, SqrtLinear
from stratagem.stages import Stages
from stratagem.train import Interrupted, TrainConfig
from tolerances import FLOAT32, assert_near

PRESETS = Path(__file__).parents[1] / "examples" / "presets"
FORMS = ["tailored", "equal", "separate", "unified"]
EDGES = (2.0, -2.0)
MADE = {"shape": [1, 8, 8], "num_classes": 2, "memory_dim": 6, "stages": list(EDGES)}
TRAIN = TrainConfig(steps=3, batch_size=6, threads=1, condition_dropout=0.1, learning_rate=1e-3)
TRANSFORMER = RunConfig(
    data="d",
    model=ModelConfig(width=16, depth=3, heads=2, labels=True),
    memory=MemoryConfig("b"),
    stages=StagesConfig(edges=EDGES, shared=1, depths=(2, 1, 1), widths=(24, 16, 8)),
    train=TRAIN,
)
UNET = RunConfig(
    data="d",
    unet=UNetModelConfig(width=8, mults=(1, 2), blocks=1, attention=(4,), labels=True, dropout=0.2),
    memory=MemoryConfig("b"),
    stages=StagesConfig(edges=EDGES, widths=(16, 8, 4)),
    train=TRAIN,
)
RUNS = {"transformer": TRANSFORMER, "unet": UNET}
each_kind = pytest.mark.parametrize("kind", RUNS)


def of_form(run: RunConfig, form: Any, **own: Any) -> RunConfig:
    assert run.stages is not None
    return replace(run, stages=replace(run.stages, form=form, **own))


def built(run: RunConfig, made: dict[str, Any] = MADE) -> MultiDecoder:
    """A network without a zero in its weights, so that all of it shows in the output."""
    torch.manual_seed(0)
    net = make_backbone(run, made).eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def batch() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    memory = normalize(torch.randn(6, 6, generator=g), dim=1)
    label = torch.randint(2, (6,), generator=g)
    x, time = torch.randn(6, 1, 8, 8, generator=g), torch.rand(6, generator=g)
    return x, time, {"memory": memory, "label": label}


def sizes(net: MultiDecoder) -> list[int]:
    return [parameters(decoder) for decoder in net.decoders]


# --- forms ---------------------------------------------------------------------------------------


@each_kind
def test_forms_share_what_they_say(kind: str) -> None:
    run = RUNS[kind]
    nets = {form: built(of_form(run, form)) for form in FORMS}
    plain = built(replace(run, stages=None), {**MADE, "stages": None})
    own = sizes(nets["tailored"])
    assert own[0] > own[1] > own[2]
    assert len({*sizes(nets["equal"])}) == 1
    assert sizes(nets["unified"]) == sizes(nets["equal"])[:1]
    assert parameters(nets["unified"]) == parameters(plain)
    whole = parameters(nets["tailored"].encoder)
    assert sizes(nets["separate"]) == [whole + size for size in own]
    assert isinstance(nets["separate"].encoder, PassOn)
    assert all(isinstance(decoder, Whole) for decoder in nets["separate"].decoders)
    bare = of_form(run, "tailored", depths=None, widths=None)
    assert sizes(built(bare)) == sizes(nets["equal"])


@each_kind
def test_a_separate_network_is_the_whole_one_of_its_size(kind: str) -> None:
    run = RUNS[kind]
    net, together = built(of_form(run, "separate")), built(run)
    x, time, given = batch()
    stage = torch.tensor([2, 0, 1, 0, 2, 1])
    found = net(x, time, stage=stage, **given)
    for k in range(3):
        weights = net.decoders[k].state_dict()
        encoder, decoder = "network.encoder.", "network.decoders.0."
        own = {n.removeprefix(encoder): w for n, w in weights.items() if encoder in n}
        together.encoder.load_state_dict(own)
        own = {n.removeprefix(decoder): w for n, w in weights.items() if decoder in n}
        together.decoders[k].load_state_dict(own)
        alone = together(x, time, stage=k, **given)
        assert_near(found[stage == k], alone[stage == k], FLOAT32)
        assert torch.equal(net(x, time, stage=k, **given), alone)
    assert_near(net(x, time, stage=0), net(x, time, stage=torch.zeros(6).long()), FLOAT32)


@each_kind
def test_the_unified_network_is_the_one_without_stages(kind: str) -> None:
    run = RUNS[kind]
    ours = built(of_form(run, "unified"))
    plain = built(replace(run, stages=None), {**MADE, "stages": None})
    x, time, given = batch()
    expected = plain(x, time, **given)
    for stage in (0, 2, torch.tensor([0, 1, 2, 0, 1, 2])):
        assert torch.equal(ours(x, time, stage=stage, **given), expected)


@each_kind
def test_conditions_reach_every_stage(kind: str) -> None:
    for form in FORMS:
        net = built(of_form(RUNS[kind], form))
        x, time, given = batch()
        for stage in range(3):
            whole = net(x, time, stage=stage, **given)
            for name in given:
                other = net(x, time, stage=stage, **{**given, name: given[name].flip(0)})
                assert (other - whole).abs().amax() > 1e-3, (form, name)


def test_pass_on_hands_over_what_is_given() -> None:
    x, time, given = batch()
    assert PassOn()(x, time, **given, memory_keep=None) == {"x_t": x, "time": time, **given}


# --- U-Nets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STYLES)
def test_styles_and_what_is_given_beside_them(name: Any) -> None:
    assert unet_style(UNetModelConfig(style=name)) == STYLES[name]
    own = UNetModelConfig(name, time="fourier", modulation="add", norm_groups=3, head_width=5)
    changed = {"time": "fourier", "time_features": 2, "modulation": "add", "norm_groups": 3}
    assert unet_style(own) == replace(STYLES[name], **changed, head_width=5)
    plain = unet_style(UNetModelConfig(name, time="sin-cos"))
    assert plain == replace(STYLES[name], time="sin-cos", time_features=1)


TIMES = [("edm", "edm", "ddpm++", 1.0), ("vp", "eps", "ddpm++", 999.0), ("vp", "v", "ncsn++", 1.0)]


@pytest.mark.parametrize(("schedule", "says", "name", "scale"), TIMES)
def test_what_a_unet_is_told_of_the_time(schedule: Any, says: Any, name: Any, scale: float) -> None:
    assert UNET.unet is not None
    diffusion = DiffusionConfig(schedule=schedule, parameterization=says)
    run = replace(UNET, unet=replace(UNET.unet, style=name), diffusion=diffusion)
    assert make_backbone(run, MADE).encoder.condition.features.scale == scale


def test_attention_and_middle_of_each_decoder() -> None:
    run = of_form(UNET, "tailored", attention=((4,), (), (8, 4)), shared_middle=False)
    net = make_backbone(run, MADE)
    attending = [
        [any(b.attention is not None for b in level) for level in d.blocks] for d in net.decoders
    ]
    assert attending == [[False, True], [False, False], [True, True]]
    assert [len(d.middle) for d in net.decoders] == [2, 2, 2]
    assert len(net.encoder.middle) == 0


def test_width_of_the_condition() -> None:
    assert condition_width(TRANSFORMER) == 16
    assert condition_width(UNET) == 32
    x, time, given = batch()
    for run in (TRANSFORMER, UNET):
        keep = torch.zeros(6, condition_width(run))
        net = built(run)
        none = net(x, time, stage=0, **given, memory_keep=keep)
        assert not torch.equal(none, net(x, time, stage=0, **given))


WRONG_SIZES: dict[str, tuple[RunConfig, dict[str, Any]]] = {
    "8x9 are not square": (UNET, {"shape": [1, 8, 9]}),
    "image_size 9 cannot be halved 1 times": (UNET, {"shape": [1, 9, 9]}),
    "image_size 9 must be a multiple of patch": (TRANSFORMER, {"shape": [1, 9, 9]}),
    r"attention at sides \[4\] has no effect": (UNET, {"shape": [1, 16, 16]}),
    "decoder width 25 must be a multiple": (
        of_form(TRANSFORMER, "tailored", widths=(25, 8, 8)),
        {},
    ),
    "the width of a decoder must be at least 1": (of_form(UNET, "tailored", widths=(0, 8, 8)), {}),
}


@pytest.mark.parametrize("message", WRONG_SIZES)
def test_sizes_that_do_not_fit_are_refused(message: str) -> None:
    run, made = WRONG_SIZES[message]
    with pytest.raises(InputError, match=message):
        make_backbone(run, {**MADE, **made})


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bank(blobs: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bank") / "bank"
    images = blobs.images(torch.arange(blobs.num))
    sides = [side.float().flatten(1)[:, :6] + 1 for side in (images, images.flip(-1))]
    store = hold(torch.stack(sides, dim=1))
    MemoryBank(store, blobs.labels, blobs.held_out, {"name": "t"}, blobs.fingerprint).save(path)
    return path


@pytest.mark.parametrize("form", FORMS)
@each_kind
def test_every_form_trains_resumes_samples_and_has_a_cost(
    kind: str, form: str, blobs: DataSet, bank: Path, tmp_path: Path
) -> None:
    place: Any = "after" if form == "equal" else "before"
    memory = MemoryConfig(str(bank), place=place)
    run = replace(of_form(RUNS[kind], form), data=str(blobs.path), memory=memory)

    def stop(done: int, total: int) -> None:
        if done == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    train(run, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(run, tmp_path / "run", progress=stop)
    train(run, tmp_path / "run")
    assert list_steps(tmp_path / "run") == [1, 3]
    ends = [load(tmp_path / name, 3).tensors["model"] for name in ("whole", "run")]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    model = open_run(tmp_path / "run")
    images = sample_run(model, SampleConfig(num=3, steps=2)).images
    assert images.shape == (3, 1, 8, 8)
    cost = cost_of(model, SampleConfig(steps=10))
    assert len(cost.stage_macs) == len(cost.calls) == 3
    first, _, last = cost.stage_macs
    assert (first > last) == (form in {"tailored", "separate"})


def test_stages_of_a_configuration(blobs: DataSet, bank: Path, tmp_path: Path) -> None:
    memory = MemoryConfig(str(bank))
    run = replace(TRANSFORMER, data=str(blobs.path), memory=memory)
    assert assemble(run).stages == Stages(EDGES)
    assert assemble(run).description["stages"] == list(EDGES)
    Stages(EDGES).save(tmp_path / "own", {"data": blobs.fingerprint})
    Stages(EDGES).save(tmp_path / "foreign", {"data": "0" * 64})
    Stages((1.0,)).save(tmp_path / "two", {"data": blobs.fingerprint})
    staged = {"edges": None, "file": str(tmp_path / "own")}
    assert assemble(of_form(run, "tailored", **staged)).stages == Stages(EDGES)
    for name, message in (("foreign", "found in other data"), ("two", "3 decoders, but .* 2 st")):
        with pytest.raises(InputError, match=message):
            assemble(of_form(run, "tailored", **{**staged, "file": str(tmp_path / name)}))


def test_labels_need_classes(blobs: DataSet, bank: Path) -> None:
    memory = MemoryConfig(str(bank))
    for run in RUNS.values():
        made = assemble(replace(run, data=str(blobs.path), memory=memory)).description
        assert made["num_classes"] == 2


def test_alignment_goes_with_one_network_for_all_stages() -> None:
    """The deepest shared block is tapped by its name, which only a shared encoder has."""
    run = replace(of_form(TRANSFORMER, "unified"), align=AlignConfig(block=1))
    net = make_backbone(run, MADE)
    assert net.get_submodule("encoder.stack.blocks.0")
    assert isinstance(net.decoders[0], TransformerDecoder)
    with pytest.raises(InputError, match="separate has none"):
        replace(run, stages=replace(run.stages, form="separate"))


# --- presets -------------------------------------------------------------------------------------

Count = tuple[int, int, list[float], float]  # channels, side, active parameters, all, in millions
PUBLISHED: dict[str, Count] = {
    "cifar10-ncsnpp-unified": (3, 32, [107.52], 107.52),
    "cifar10-ncsnpp-multistage": (3, 32, [169.48, 107.52, 47.13], 237.17),
    "celeba32-edm-unified": (3, 32, [55.73], 55.73),
    "celeba32-edm-multistage": (3, 32, [87.92, 55.73, 24.41], 128.79),
    "celebahq-ldm-unified": (3, 64, [274.06], 274.06),
    "celebahq-ldm-multistage": (3, 64, [315.97, 223.83, 169.87], 493.84),
}
MACS = {"celebahq-ldm-multistage": [120.4, 78.2, 53.4], "celebahq-ldm-unified": [101.2]}


def on_meta(run: RunConfig, channels: int, side: int) -> MultiDecoder:
    edges = run.stages.edges if run.stages is not None else None
    made = {"shape": [channels, side, side], "num_classes": 0, "memory_dim": 0, "stages": edges}
    with torch.device("meta"):
        return make_backbone(run, made)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name: str) -> None:
    channels, side, active, everything = PUBLISHED[name]
    net = on_meta(load_config(PRESETS / f"{name}.yaml"), channels, side)
    found = [(parameters(net.encoder) + size) / 1e6 for size in sizes(net)]
    assert found == pytest.approx(active, abs=0.01)
    assert parameters(net) / 1e6 == pytest.approx(everything, abs=0.01)
    if name in MACS:
        x, t = torch.zeros(1, channels, side, side, device="meta"), torch.zeros(1, device="meta")
        giga = [macs(net, x, t, stage=k) / 1e9 for k in range(net.num_stages)]
        assert giga == pytest.approx(MACS[name], abs=0.05)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "multistage" in name])
def test_presets_become_their_baselines_by_one_override(name: str) -> None:
    channels, side, active, _ = PUBLISHED[name]
    path, unified = PRESETS / f"{name}.yaml", PUBLISHED[name.replace("multistage", "unified")]
    nets = {f: on_meta(load_config(path, [f"stages.form={f}"]), channels, side) for f in FORMS}
    assert parameters(nets["unified"]) / 1e6 == pytest.approx(unified[3], abs=0.01)
    assert [size / 1e6 for size in sizes(nets["separate"])] == pytest.approx(active, abs=0.01)
    encoder = parameters(nets["equal"].encoder)
    each = [(encoder + size) / 1e6 for size in sizes(nets["equal"])]
    assert each == pytest.approx([unified[3]] * 3, abs=0.01)


def test_presets_cut_the_axis_where_the_originals_do() -> None:
    """EDM by sigma, NCSN++ by VP's t, LDM by the number of a step of its own schedule."""
    cuts = {
        "celeba32-edm-multistage": (EDM(), lambda t: EDM().sigma(t), (2.5103, 7.6577)),
        "cifar10-ncsnpp-multistage": (VP(), lambda t: t, (0.442, 0.6308)),
        "celebahq-ldm-multistage": (SqrtLinear(), lambda t: 999 * t, (442, 631)),
    }
    for name, (schedule, unit, expected) in cuts.items():
        staged = load_config(PRESETS / f"{name}.yaml").stages
        assert staged is not None
        times = torch.tensor(Stages(staged.edges or ()).times(schedule), dtype=torch.float64)
        assert unit(times).tolist() == pytest.approx(expected, rel=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet-digits", "unet-stages-digits"])
def test_small_presets_train(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (PRESETS / f"{name}.yaml").read_text()
    commands = [line.removeprefix("#   stratagem ") for line in text.splitlines() if "#   " in line]
    for line in commands:
        short = line.replace("examples/presets", str(PRESETS))
        if line.startswith("train"):
            short += " --set train.steps=30 --set train.log_every=5 --set train.batch_size=32"
        assert main(short.split()) == 0
    run = Path(commands[-1].split()[-1])
    lines = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1] < 0.8 * lines[0]
