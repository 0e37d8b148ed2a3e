"""Official U-Nets: every stage of every golden network, by itself and as an imported run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stratagem.assemble import Model, open_run
from stratagem.cli import main
from stratagem.denoiser import Denoiser
from stratagem.errors import InputError
from stratagem.interop.unet import UNetProject, convert_unet
from stratagem.interop.unet_shapes import (
    FAMILIES,
    OfficialUNet,
    UNetSource,
    inspect_unet,
)
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.nets.unet import UNetConfig, UNetDecoder, UNetEncoder
from stratagem.nets.unet_style import STYLES
from stratagem.schedule import EDM, VP, SqrtLinear
from tolerances import FLOAT32, NETWORK, assert_near

GOLDEN = Path(__file__).parent / "golden"
PROJECTS: dict[str, UNetProject] = {
    "edm_unet_ddpmpp": "edm",
    "edm_unet_ncsnpp": "edm",
    "edm_multistage_unet": "edm",
    "ncsnpp_multistage": "ncsnpp",
    "ldm_multistage_unet_a": "ldm",
    "ldm_multistage_unet_b": "ldm",
}
PLAIN = ["edm_unet_ddpmpp", "edm_unet_ncsnpp"]
STAGED = [
    ("edm_multistage_unet", 3),
    ("ncsnpp_multistage", 3),
    ("ldm_multistage_unet_a", 3),
    ("ldm_multistage_unet_b", 2),
]
State = dict[str, Tensor]


def golden(name: str) -> tuple[dict[str, Any], State, State]:
    """Constructor arguments, weights by official name, inputs and outputs by theirs."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if "weights/" in k}
    return config, weights, tensors


def configuration(name: str, c: dict[str, Any]) -> tuple[UNetConfig, list[int]]:
    """Our configuration of an official one, and the widths of its decoders."""
    if PROJECTS[name] == "edm":
        width = c.get("en_model_channels") or c["model_channels"]
        like = STYLES["ncsn++" if c["encoder_type"] == "residual" else "ddpm++"]
        groups = c["groupnorm"]["num_groups"]
        cfg = UNetConfig(
            image_size=c["img_resolution"],
            channels=c["img_channels"],
            width=width,
            mults=tuple(c["channel_mult"]),
            blocks=c["num_blocks"],
            attention=tuple(c["attn_resolutions"]),
            style=replace(like, time_features=c["channel_mult_noise"], norm_groups=groups),
            num_classes=c["label_dim"],
            condition_mult=c["channel_mult_emb"],
            shared_middle=False,
        )
        return cfg, c.get("de_model_channels", [width])
    if PROJECTS[name] == "ncsnpp":
        m, data = c["model"], c["data"]
        like = replace(STYLES["ncsn++"], time="sin-cos", time_features=1, norm_groups=m["group"])
        levels = (tuple(m["ch_mult"]), m["num_res_blocks"], tuple(m["attn_resolutions"]))
        size = (data["image_size"], data["num_channels"], m["en_nf"])
        return UNetConfig(*size, *levels, like), m["de_nfs"]
    size, sides = c["image_size"], [c["image_size"] // f for f in c["attention_resolutions"]]
    like = replace(
        STYLES["ldm"],
        head_width=c["num_head_channels"],
        modulation="scale-shift" if c["use_scale_shift_norm"] else "add",
    )
    levels = (tuple(c["channel_mult"]), c["num_res_blocks"], tuple(sides))
    cfg = UNetConfig(size, c["in_channels"], c["model_channels"], *levels, like)
    return replace(cfg, num_classes=c["num_classes"] or 0), c["de_nfs"]


def ldm_attention(cfg: UNetConfig, stage: int) -> tuple[int, ...]:
    """Where the published decoder of a stage attends: its constructor counts on between stages.

    Level l of decoder k is taken for one with sides of image_size / (2^l >> k (levels - 1)).
    """
    drop = stage * (len(cfg.mults) - 1)
    factors = {cfg.image_size // side for side in cfg.attention}
    return tuple(s for s in cfg.sides if (cfg.image_size // s) >> drop in factors)


def build(name: str, cfg: UNetConfig, widths: list[int]) -> MultiDecoder:
    decoders = []
    for k, width in enumerate(widths):
        sides = ldm_attention(cfg, k) if PROJECTS[name] == "ldm" else None
        decoders.append(UNetDecoder(cfg, width, sides))
    return MultiDecoder(UNetEncoder(cfg), decoders).eval()


def loaded(name: str, **own: Any) -> tuple[MultiDecoder, State]:
    config, weights, tensors = golden(name)
    cfg, widths = configuration(name, config)
    net = build(name, replace(cfg, **own), widths)
    net.load_state_dict(convert_unet(weights, PROJECTS[name], cfg, net))
    return net.requires_grad_(False), tensors


def times(tensors: State, stage: str) -> Tensor:
    """What the official network is told of the time."""
    for key in ("time_cond", "timesteps"):
        if f"inputs/{stage}/{key}" in tensors:
            return tensors[f"inputs/{stage}/{key}"].float()
    return tensors[f"inputs/{stage}/sigma"].log() / 4


def inputs(tensors: State, stage: str) -> Tensor:
    x, sigma = tensors[f"inputs/{stage}/x"], tensors.get(f"inputs/{stage}/sigma")
    return x if sigma is None else x / (0.25 + sigma**2).sqrt()[:, None, None, None]


def outputs(tensors: State, stage: str) -> Tensor:
    return tensors.get(f"outputs/{stage}", tensors.get(f"outputs/{stage}/F"))  # type: ignore[return-value]


# --- plain networks ------------------------------------------------------------------------------


def labels(tensors: State) -> dict[str, Tensor]:
    """A row of zeros is the absent class."""
    if "inputs/class_labels" not in tensors:
        return {}
    one_hot = tensors["inputs/class_labels"]
    absent = one_hot.shape[1]
    return {"label": torch.where(one_hot.any(1), one_hot.argmax(1), absent)}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_network(name: str, shared: bool) -> None:
    net, tensors = loaded(name, shared_middle=shared)
    x, sigma, label = tensors["inputs/x"], tensors["inputs/sigma"], labels(tensors)
    scaled = x / (0.25 + sigma**2).sqrt()[:, None, None, None]
    assert_near(net(scaled, sigma.log() / 4, **label), tensors["outputs/raw_F"], NETWORK)
    denoiser = Denoiser(net, EDM(), "edm")
    t = EDM().time_of(-2 * sigma.double().log())
    assert_near(denoiser(x, t, **label).x, tensors["outputs/edm_D"], NETWORK)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_network_under_other_preconditioning(name: str) -> None:
    """VP and VE of Karras et al. 2022, table 1: D = x -+ sigma F(c_in x, c_noise)."""
    net, tensors = loaded(name)
    x, label = tensors["inputs/x"], labels(tensors)
    sigma = tensors["inputs/sigma"]
    s = sigma[:, None, None, None]
    beta_d, beta_min, steps = 19.9, 0.1, 1000
    log = (1 + sigma**2).log()  # in float32, as there: it rounds where sigma is small
    c_noise = (steps - 1) * ((beta_min**2 + 2 * beta_d * log).sqrt() - beta_min) / beta_d
    assert_near(c_noise, tensors["outputs/vp_c_noise"], FLOAT32)
    c_noise = tensors["outputs/vp_c_noise"]  # its last bit counts: Fourier features multiply it
    t = torch.linspace(0.05, 1, 7)
    assert_near(VP().sigma(t) / VP().alpha(t), tensors["outputs/vp_sigma_of_t"], FLOAT32)
    found = {
        "vp_D": x - s * net(x / (s**2 + 1).sqrt(), c_noise, **label),
        "ve_D": x + s * net(x, (sigma / 2).log(), **label),
    }
    for key, ours in found.items():
        theirs = tensors[f"outputs/{key}"]
        assert ((ours - theirs).abs() <= 1e-5 * (1 + s + theirs.abs())).all(), key


# --- stages --------------------------------------------------------------------------------------


def label_of(tensors: State, stage: str) -> dict[str, Tensor]:
    key = f"inputs/{stage}/y"
    return {"label": tensors[key]} if key in tensors else {}


@pytest.mark.parametrize(("name", "stages"), STAGED)
def test_every_stage(name: str, stages: int) -> None:
    net, tensors = loaded(name)
    assert net.num_stages == stages
    for k in range(stages):
        at = f"stage{k}"
        x, time, label = inputs(tensors, at), times(tensors, at), label_of(tensors, at)
        theirs = outputs(tensors, at)
        assert_near(net(x, time, stage=k, **label), theirs, NETWORK)
        other = net(x, time, stage=(k + 1) % stages, **label)
        assert (other - theirs).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize(("name", "stages"), STAGED)
def test_mixed_stages_are_routed_by_row(name: str, stages: int) -> None:
    """The official code takes the first row's decoder for all rows; ours each row's own."""
    net, tensors = loaded(name)
    names = [f"stage{k}" for k in range(stages)]
    stage = torch.arange(stages).repeat_interleave(3)
    order = torch.randperm(len(stage), generator=torch.Generator().manual_seed(0))

    def joined(part: Callable[[State, str], Tensor]) -> Tensor:
        return torch.cat([part(tensors, at) for at in names])[order]

    known = label_of(tensors, names[0])
    label = {key: joined(lambda s, at: label_of(s, at)["label"]) for key in known}
    ours = net(joined(inputs), joined(times), stage=stage[order], **label)
    assert_near(ours, joined(outputs), NETWORK)


@pytest.mark.parametrize("name", [n for n, _ in STAGED if n != "edm_multistage_unet"])
def test_the_official_mixed_batch(name: str) -> None:
    net, tensors = loaded(name)
    x, time = inputs(tensors, "quirk_mixed"), times(tensors, "quirk_mixed")
    label, theirs = label_of(tensors, "quirk_mixed"), outputs(tensors, "quirk_mixed")
    assert_near(net(x, time, stage=0, **label), theirs, NETWORK)
    own = net(x, time, stage=torch.tensor([0, net.num_stages - 1]), **label)
    assert_near(own[0], theirs[0], NETWORK)
    assert (own[1] - theirs[1]).abs().max() > 1e-3


# --- imported runs -------------------------------------------------------------------------------

# Whose they are, and what their weights do not tell.
IMPORTS: dict[str, tuple[UNetSource, str]] = {
    "edm_unet_ddpmpp": ("edm", ""),
    "edm_unet_ncsnpp": ("edm", ""),
    "edm_multistage_unet": ("multistage-edm", ""),
    "ncsnpp_multistage": ("ncsnpp-multistage", "--image-size 8 --norm-groups 4"),
    "ldm_multistage_unet_a": ("ldm-multistage", "--image-size 8 --head-width 16"),
    "ldm_multistage_unet_b": ("ldm-multistage", "--image-size 4 --head-width 16 --cuts 442"),
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Imports each golden network once, through the command line, and opens the run."""
    folder, runs = tmp_path_factory.mktemp("imported"), dict[str, Model]()

    def get(name: str) -> Model:
        if name not in runs:
            save_file(golden(name)[1], folder / f"{name}.safetensors")
            source, flags = IMPORTS[name]
            line = f"import {folder / name}.safetensors --from {source} --out {folder / name}"
            assert main([*line.split(), *flags.split()]) == 0
            runs[name] = open_run(folder / name)
        return runs[name]

    return get


@pytest.mark.parametrize("name", PLAIN)
def test_imported_plain_network(name: str, imported: Callable[[str], Model]) -> None:
    model, (_, _, tensors) = imported(name), golden(name)
    t = EDM().time_of(-2 * tensors["inputs/sigma"].double().log())
    found = model.denoiser(tensors["inputs/x"], t, **labels(tensors)).x
    assert_near(found, tensors["outputs/edm_D"], NETWORK)


@pytest.mark.parametrize(("name", "stages"), STAGED)
def test_imported_run_takes_every_row_to_its_stage(
    name: str, stages: int, imported: Callable[[str], Model]
) -> None:
    """Rows of all stages at once, routed by their noise level alone."""
    model, (_, _, tensors) = imported(name), golden(name)
    names, edm = [f"stage{k}" for k in range(stages)], PROJECTS[name] == "edm"
    x = torch.cat([tensors[f"inputs/{at}/x"] for at in names])
    if edm:
        sigma = torch.cat([tensors[f"inputs/{at}/sigma"] for at in names])
        t = model.denoiser.schedule.time_of(-2 * sigma.double().log())
    else:
        t = torch.cat([times(tensors, at) for at in names]).double() / 999
    label = torch.cat([label_of(tensors, at).get("label", torch.zeros(0)) for at in names])
    known = {"label": label} if len(label) else {}
    prediction = model.denoiser(x, t, **known)
    theirs = torch.cat([tensors[f"outputs/{at}{'/D' if edm else ''}"] for at in names])
    assert_near(prediction.x if edm else prediction.eps, theirs, NETWORK)
    for row, at in enumerate(t):  # and a sampler's way, one time for all rows
        one = {key: value[row : row + 1] for key, value in known.items()}
        alone = model.denoiser(x[row : row + 1], at, **one)
        assert_near((alone.x if edm else alone.eps)[0], theirs[row], NETWORK)


@pytest.mark.parametrize("name", IMPORTS)
def test_imported_run_is_sampled_like_any_other(
    name: str, imported: Callable[[str], Model], tmp_path: Path
) -> None:
    model = imported(name)
    line = f"sample {model.path} --num 2 --steps 2 --out {tmp_path / 's'}"
    assert main(line.split()) == 0
    made = json.loads((model.path / "run.json").read_text())["meta"]
    assert made["imported"]["from"] == FAMILIES[IMPORTS[name][0]].title
    latents = (tmp_path / "s" / "latents.safetensors").is_file()
    assert latents == (PROJECTS[name] == "ldm")
    assert len(list((tmp_path / "s").glob("*.png"))) == (0 if latents else 2)


@pytest.mark.parametrize("first", [3, 442])
def test_steps_of_latent_diffusion_on_their_edges_belong_to_the_later_stage(
    first: int, tmp_path: Path
) -> None:
    """Even where the log-SNR of the step, computed in float32, is above that of the edge."""
    save_file(golden("ldm_multistage_unet_a")[1], tmp_path / "w.safetensors")
    words = f"--image-size 8 --head-width 16 --cuts {first} 631 --out {tmp_path}/run"
    assert main(f"import {tmp_path}/w.safetensors --from ldm-multistage {words}".split()) == 0
    denoiser = open_run(tmp_path / "run").denoiser
    assert denoiser.stages is not None
    assert denoiser.schedule == SqrtLinear()
    for kind in (torch.float32, torch.float64):
        steps = torch.tensor([0, first - 0.1, first, 630.9, 631, 999], dtype=torch.float64)
        stage = denoiser.stages.index(denoiser.schedule.log_snr((steps / 999).to(kind)))
        assert stage.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name", IMPORTS)
def test_sizes_are_read_from_the_weights(name: str) -> None:
    config, weights, _ = golden(name)
    cfg, widths = configuration(name, config)
    source, flags = IMPORTS[name]
    words = flags.split()
    told: dict[str, Any] = {
        k.removeprefix("--").replace("-", "_"): int(v)
        for k, v in zip(words[::2], words[1::2], strict=True)
    }
    if "cuts" in told:
        told["cuts"] = (told["cuts"],)
    found = inspect_unet(weights, source, **told)
    assert isinstance(found, OfficialUNet)
    sides = tuple(s for s in cfg.sides if s in cfg.attention)
    shared = cfg.shared_middle or name in PLAIN  # one decoder: all the same
    assert found.cfg == replace(cfg, attention=sides, shared_middle=shared)
    assert found.widths == tuple(widths)
    expected = tuple(ldm_attention(found.cfg, k) for k in range(len(widths)))
    assert found.attention == (expected if name == "ldm_multistage_unet_a" else None)


WRONG_IMPORTS = [
    ("edm_unet_ddpmpp", "multistage-edm", "", "multistage EDM of 1 decoders has 0 cuts"),
    ("edm_multistage_unet", "edm", "", "EDM of 3 decoders has 2 cuts between them, not 0"),
    ("edm_multistage_unet", "multistage-edm", "--cuts 7 2", "must decrease"),
    ("edm_multistage_unet", "multistage-edm", "--norm-groups 7", "groups"),
    ("edm_multistage_unet", "multistage-edm", "--head-width 4", "--head-width has no effect"),
    ("edm_multistage_unet", "multistage-edm", "--heads 4", "--heads has no effect with --from"),
    ("edm_multistage_unet", "multistage-edm", "--bank b", "--bank has no effect"),
    ("edm_multistage_unet", "multistage-edm", "--image-size 16", "contradicts the weights: 8"),
    ("ncsnpp_multistage", "ncsnpp-multistage", "", "do not tell the side of the images"),
    ("ncsnpp_multistage", "ncsnpp-multistage", "--image-size 7", "cannot be halved 1 times"),
    (
        "ncsnpp_multistage",
        "ldm-multistage",
        "--image-size 8",
        "'input_blocks.0.0.weight' is missing",
    ),
    ("ldm_multistage_unet_a", "edm", "", "not the weights of EDM: they hold no blocks"),
    ("ldm_multistage_unet_a", "ldm-multistage", "--image-size 8 --head-width 7", "heads of 7"),
    ("ldm_multistage_unet_a", "sit", "--cuts 3", "--cuts has no effect with --from sit"),
]


@pytest.mark.parametrize(("name", "source", "flags", "message"), WRONG_IMPORTS)
def test_wrong_imports_end_in_one_line(
    name: str,
    source: str,
    flags: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert source == "sit" or source in FAMILIES
    save_file(golden(name)[1], tmp_path / "w.safetensors")
    line = f"import {tmp_path}/w.safetensors --from {source} --out {tmp_path}/run {flags}"
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --- ADM, by its names ---------------------------------------------------------------------------


def test_adm_takes_its_place() -> None:
    """EDM's ADM of two levels, one block each; its label has no bias, its resampling no weights."""
    like = replace(STYLES["adm"], head_width=4)
    cfg = UNetConfig(8, 3, 8, (1, 2), 1, (4,), like, num_classes=5, shared_middle=False)
    net = MultiDecoder(UNetEncoder(cfg), [UNetDecoder(cfg)])
    # Name -> input and output channels; attention at 4x4.
    blocks = {
        "enc.8x8_block0": (8, 8),
        "enc.4x4_down": (8, 8),
        "enc.4x4_block0": (8, 16),
        "dec.4x4_in0": (16, 16),
        "dec.4x4_in1": (16, 16),
        "dec.4x4_block0": (32, 16),
        "dec.4x4_block1": (24, 16),
        "dec.8x8_up": (16, 16),
        "dec.8x8_block0": (24, 8),
        "dec.8x8_block1": (16, 8),
    }
    attending = {"enc.4x4_block0", "dec.4x4_in0", "dec.4x4_block0", "dec.4x4_block1"}
    shapes: dict[str, tuple[int, ...]] = {
        "map_layer0": (32, 8),
        "map_layer1": (32, 32),
        "enc.8x8_conv": (8, 3, 3, 3),
        "out_norm": (8,),
        "out_conv": (3, 8, 3, 3),
    }
    for name, (before, width) in blocks.items():
        shapes |= {f"{name}.norm0": (before,), f"{name}.norm1": (width,)}
        shapes |= {f"{name}.conv0": (width, before, 3, 3), f"{name}.conv1": (width, width, 3, 3)}
        shapes[f"{name}.affine"] = (2 * width, 32)
        if before != width:
            shapes[f"{name}.skip"] = (width, before, 1, 1)
        if name in attending:
            shapes |= {f"{name}.norm2": (width,), f"{name}.qkv": (3 * width, width, 1, 1)}
            shapes[f"{name}.proj"] = (width, width, 1, 1)
    g = torch.Generator().manual_seed(0)
    weights = {f"model.{n}.weight": torch.randn(s, generator=g) for n, s in shapes.items()}
    weights |= {f"model.{n}.bias": torch.randn(s[0], generator=g) for n, s in shapes.items()}
    weights["model.map_label.weight"] = torch.randn(32, 5, generator=g)
    found = inspect_unet(weights, "edm", head_width=4)
    assert (found.style, found.cfg) == ("adm", replace(cfg, shared_middle=True))
    made = convert_unet(weights, "edm", cfg, net)
    rows = made["encoder.condition.join.label.weight"]
    assert torch.equal(rows[:5], weights["model.map_label.weight"].T)
    assert not rows[5].any()
    theirs = weights["model.enc.4x4_block0.qkv.weight"][:, :, 0, 0]  # head, number, part
    ours = made["encoder.blocks.1.0.attention.qkv.weight"]  # part, head, number
    for part in range(3):
        for head in range(4):
            for i in range(4):
                assert torch.equal(ours[16 * part + 4 * head + i], theirs[12 * head + 3 * i + part])
    assert torch.equal(
        made["decoders.0.up.0.conv_in.weight"], weights["model.dec.8x8_up.conv0.weight"]
    )


# --- strictness ----------------------------------------------------------------------------------


def test_where_official_latent_decoders_attend() -> None:
    for name in ("ldm_multistage_unet_a", "ldm_multistage_unet_b"):
        config, _, _ = golden(name)
        cfg, widths = configuration(name, config)
        for k in range(len(widths)):
            attends = config["decoder_attention"][k]  # by block, the smallest sides first
            by_block = [side in ldm_attention(cfg, k) for side in reversed(cfg.sides)]
            assert [a for a in by_block for _ in range(cfg.blocks + 1)] == attends


def test_what_training_alone_needs_is_left_out() -> None:
    config, weights, _ = golden("edm_unet_ddpmpp")
    cfg, widths = configuration("edm_unet_ddpmpp", config)
    net = build("edm_unet_ddpmpp", cfg, widths)
    bare = {k.removeprefix("model."): v for k, v in weights.items()}
    more = {**bare, "map_augment.weight": torch.zeros(20, 9)}
    for state in (bare, more, {k: v.half() for k, v in weights.items()}):
        made = convert_unet(state, "edm", cfg, net)
        assert set(made) == set(net.state_dict())
        assert all(tensor.dtype == torch.float32 for tensor in made.values())


@pytest.mark.parametrize("name", PROJECTS)
def test_each_weight_is_needed_and_no_other_is_taken(name: str) -> None:
    config, weights, _ = golden(name)
    cfg, widths = configuration(name, config)
    with torch.device("meta"):
        net = build(name, cfg, widths)
    idle = {key for key in weights if key.endswith("resample_filter") or key == "sigmas"}
    needed = [key for key in weights if key not in idle]
    for key in needed[:: len(needed) // 7]:
        rest = {k: v for k, v in weights.items() if k != key}
        with pytest.raises(InputError, match=rf"1 missing \({key.removeprefix('model.')}\)"):
            convert_unet(rest, PROJECTS[name], cfg, net)
    with pytest.raises(InputError, match=r"1 unexpected \(odd\)"):
        convert_unet({**weights, "odd": torch.zeros(1)}, PROJECTS[name], cfg, net)
    tricky = [key for key in needed if "qkv" in key or "NIN_0" in key or "label" in key]
    for key in (needed[0], *tricky[:3], *tricky[-2:]):
        for odd in (torch.zeros(1), torch.zeros(7, 7)):
            with pytest.raises(InputError, match="mis-shaped"):
                convert_unet({**weights, key: odd}, PROJECTS[name], cfg, net)


def test_networks_of_other_options_are_refused() -> None:
    config, weights, _ = golden("edm_unet_ncsnpp")
    cfg, widths = configuration("edm_unet_ncsnpp", config)
    boxes = replace(cfg, style=replace(cfg.style, fir=False))
    with pytest.raises(InputError, match="not the filter of this style"):
        convert_unet(weights, "edm", boxes, build("edm_unet_ncsnpp", boxes, widths))
    with_memory = replace(cfg, memory_dim=3)
    with pytest.raises(InputError, match=r"2 missing \(encoder.condition.join.memory"):
        convert_unet(weights, "edm", with_memory, build("edm_unet_ncsnpp", with_memory, widths))
    config, weights, _ = golden("ldm_multistage_unet_a")
    cfg, widths = configuration("ldm_multistage_unet_a", config)
    everywhere = MultiDecoder(UNetEncoder(cfg), [UNetDecoder(cfg, w) for w in widths])
    with pytest.raises(InputError, match="missing"):
        convert_unet(weights, "ldm", cfg, everywhere)
