"""EDM, NCSN++ and latent diffusion: official state dicts of U-Nets into ours.

    edm      EDM's networks (arXiv:2206.00364) and their multistage form: DDPM++, NCSN++, ADM
    ncsnpp   multistage NCSN++ (arXiv:2312.09181 on arXiv:2011.13456)
    ldm      multistage latent diffusion (arXiv:2312.09181 on arXiv:2112.10752)

All is names, but for a few orders of numbers. The rows of the map to queries, keys and values run
(part, head, number) in ours, (head, number, part) in EDM's and (head, part, number) in LDM's;
NCSN++ has three maps, transposed. EDM's label is a one-hot vector times a matrix, ours a row of a
table whose last row is the absent label: EDM's bias where there is one (DDPM++, NCSN++), else 0.

Time: EDM's networks are told ln(sigma) / 4, NCSN++'s 999 t, LDM's the number of a step, 0 to 999:
`time_scale` is part of our configuration and not of their weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stratagem.errors import InputError
from stratagem.interop.state_dict import require_match
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.nets.unet import UNetConfig

__all__ = ["UNetProject", "convert_unet"]

UNetProject = Literal["edm", "ncsnpp", "ldm"]

# what the modules of our block are called there
_PARTS = ("norm_in", "conv_in", "modulation", "norm_out", "conv_out", "skip")
_BLOCK = {
    "edm": ("norm0", "conv0", "affine", "norm1", "conv1", "skip"),
    "ncsnpp": ("GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1", "Conv_2"),
    "ldm": ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3",
            "skip_connection"),
}  # fmt: skip
_ATTENTION_PARTS = ("norm_attention", "attention.qkv", "attention.out")
_ATTENTION = {
    "edm": ("norm2", "qkv", "proj"),
    "ncsnpp": ("GroupNorm_0", "NIN_", "NIN_3"),
    "ldm": ("norm", "qkv", "proj_out"),
}
_CONDITION = {
    "edm": ("map_layer0", "map_layer1", "map_label"),
    "ncsnpp": ("en_modules.0", "en_modules.1", ""),
    "ldm": ("time_embed.0", "time_embed.2", "label_emb"),
}
_TITLES = {"edm": "EDM", "ncsnpp": "multistage NCSN++", "ldm": "multistage LDM"}


class _Source(NamedTuple):
    """Where one of our tensors comes from: the named official ones, through a function."""

    names: tuple[str, ...]
    make: Callable[..., Tensor]


def convert_unet(
    weights: Mapping[str, Tensor], project: UNetProject, cfg: UNetConfig, net: MultiDecoder
) -> dict[str, Tensor]:
    """Returns official weights as a state dict of our network, float32.

    What has no effect in sampling is left out: EDM's map of augmentation labels, which are then 0,
    the fixed filters, which are compared with ours, and NCSN++'s table of noise levels.

    Args:
        weights: By official name; of the network alone, or of EDM's preconditioned one.
        project: Whose they are.
        cfg: Our configuration of the same network.
        net: A network of that configuration; only its names and shapes are used, so it may lie on
            the meta device.

    Raises:
        InputError: If a weight is missing, unexpected or mis-shaped, or a filter is not ours.
    """
    what = f"this U-Net of {_TITLES[project]}"
    if project == "edm":
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    _check_filters(weights, cfg)
    own = {name: tensor for name, tensor in weights.items() if not _is_idle(name)}
    sources = _sources(project, cfg, net)
    needed = {name for source in sources.values() for name in source.names}
    require_match(own, {n: own[n].shape if n in own else torch.Size() for n in needed}, what)
    made = {name: _make(source, own, what) for name, source in sources.items()}
    require_match(made, {name: tensor.shape for name, tensor in net.state_dict().items()}, what)
    return made


def _make(source: _Source, own: Mapping[str, Tensor], what: str) -> Tensor:
    try:
        return source.make(*(own[name].float() for name in source.names))
    except (RuntimeError, IndexError) as error:
        names = ", ".join(f"{name} {tuple(own[name].shape)}" for name in source.names)
        raise InputError(f"these are not the weights of {what}: mis-shaped {names}") from error


def _is_idle(name: str) -> bool:
    return name.endswith("resample_filter") or name in {"map_augment.weight", "sigmas"}


def _check_filters(weights: Mapping[str, Tensor], cfg: UNetConfig) -> None:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0] if cfg.style.fir else [1.0, 1.0])
    ours = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
    for name, theirs in weights.items():
        if name.endswith("resample_filter") and (
            theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours, atol=1e-3)
        ):
            raise InputError(f"{name} is not the filter of this style: set its fir accordingly")


# --- names -------------------------------------------------------------------------------------


def _modules(project: UNetProject, cfg: UNetConfig, net: MultiDecoder) -> dict[str, str]:
    """Returns our module -> official module, for all modules that hold weights."""
    held = {name.rsplit(".", 1)[0] for name in net.state_dict()}
    match project:
        case "edm":
            pairs = _edm(cfg, net)
        case "ncsnpp":
            pairs = _ncsnpp(cfg, net, held)
        case "ldm":
            pairs = _ldm(cfg, net, held)
    up, down, label = _CONDITION[project]
    own = {
        "encoder.condition.join.time.0": up,
        "encoder.condition.join.time.2": down,
        "encoder.condition.label": label,
        "encoder.condition.join.label": label,
        "encoder.condition.features": "map_noise",
    }
    return {ours: theirs for ours, theirs in [*own.items(), *pairs] if ours in held}


_Pairs = Iterator[tuple[str, str]]


def _block(project: UNetProject, ours: str, block: str, attention: str) -> _Pairs:
    for ours_part, part in zip(_PARTS, _BLOCK[project], strict=True):
        yield f"{ours}.{ours_part}", f"{block}.{part}"
    for ours_part, part in zip(_ATTENTION_PARTS, _ATTENTION[project], strict=True):
        yield f"{ours}.{ours_part}", f"{attention}.{part}"


def _edm(cfg: UNetConfig, net: MultiDecoder) -> _Pairs:
    """Parts are named by their sides; a middle of one decoder is that decoder's."""

    def block(ours: str, theirs: str) -> _Pairs:
        return _block("edm", ours, theirs, theirs)

    places = [f"{side}x{side}" for side in cfg.sides]
    yield "encoder.stem", f"enc.{places[0]}_conv"
    for level, at in enumerate(places):
        yield from block(f"encoder.down.{level - 1}", f"enc.{at}_down")
        yield f"encoder.pyramid.{level - 1}.conv", f"enc.{at}_aux_residual"
        for i in range(cfg.blocks):
            yield from block(f"encoder.blocks.{level}.{i}", f"enc.{at}_block{i}")
    for k in range(net.num_stages):
        top = "dec" if net.num_stages == 1 else f"decs.{k}"
        for i in range(2):
            for owner in ("encoder", f"decoders.{k}"):
                yield from block(f"{owner}.middle.{i}", f"{top}.{places[-1]}_in{i}")
        for level, at in enumerate(places):
            yield from block(f"decoders.{k}.up.{level}", f"{top}.{at}_up")
            for i in range(cfg.blocks + 1):
                yield from block(f"decoders.{k}.blocks.{level}.{i}", f"{top}.{at}_block{i}")
        adm = cfg.style.modulation == "scale-shift"
        yield f"decoders.{k}.norm", "out_norm" if adm else f"{top}.{places[0]}_aux_norm"
        yield f"decoders.{k}.out", "out_conv" if adm else f"{top}.{places[0]}_aux_conv"


def _way_down(cfg: UNetConfig) -> Iterator[str]:
    """Our parts in the order of their use, from the stem to the middle."""
    for level in range(len(cfg.mults)):
        if level:
            yield f"encoder.down.{level - 1}"
        if level and cfg.style.pyramid:
            yield f"encoder.pyramid.{level - 1}"
        yield from (f"encoder.blocks.{level}.{i}" for i in range(cfg.blocks))


def _way_up(cfg: UNetConfig, stage: int) -> Iterator[str]:
    """Our parts in the order of their use, from the middle to the output."""
    for level in reversed(range(len(cfg.mults))):
        yield from (f"decoders.{stage}.blocks.{level}.{i}" for i in range(cfg.blocks + 1))
        if level:
            yield f"decoders.{stage}.up.{level - 1}"


def _ncsnpp(cfg: UNetConfig, net: MultiDecoder, held: set[str]) -> _Pairs:
    """Parts are numbered in their order; attention is a part of its own."""
    middle = ("encoder.middle.0", "encoder.middle.1")
    lists = [("en_modules", count(2), ["encoder.stem", *_way_down(cfg), *middle])]
    for k in range(net.num_stages):
        parts = [*_way_up(cfg, k), f"decoders.{k}.norm", f"decoders.{k}.out"]
        lists.append((f"de_modules.{k}", count(), parts))
    for prefix, number, parts in lists:
        for part in parts:
            own = f"{prefix}.{next(number)}"
            attends = f"{part}.attention.qkv" in held
            attention = f"{prefix}.{next(number)}" if attends else own
            yield part, own
            yield f"{part}.conv", f"{own}.Conv2d_0"  # of the pyramid
            yield from _block("ncsnpp", part, own, attention)


def _ldm(cfg: UNetConfig, net: MultiDecoder, held: set[str]) -> _Pairs:
    """Groups are numbered in their order, and within a group its modules."""
    for number, part in enumerate(("encoder.stem", *_way_down(cfg))):
        group = f"input_blocks.{number}"
        yield part, f"{group}.0"
        yield f"{part}.conv", f"{group}.0.op"
        yield from _block("ldm", part, f"{group}.0", f"{group}.1")
    yield from _block("ldm", "encoder.middle.0", "middle_block.0", "middle_block.1")
    yield from _block("ldm", "encoder.middle.1", "middle_block.2", "")
    for k in range(net.num_stages):
        number, place = -1, 0
        for part in _way_up(cfg, k):
            if ".up." in part:  # the last of the group of the block before
                yield f"{part}.conv", f"de_modules.{k}.{number}.{place}.conv"
                continue
            number, place = number + 1, 2 if f"{part}.attention.qkv" in held else 1
            group = f"de_modules.{k}.{number}"
            yield from _block("ldm", part, f"{group}.0", f"{group}.1")
        yield f"decoders.{k}.norm", f"outs.{k}.0"
        yield f"decoders.{k}.out", f"outs.{k}.2"


# --- numbers -----------------------------------------------------------------------------------


def _sources(project: UNetProject, cfg: UNetConfig, net: MultiDecoder) -> dict[str, _Source]:
    """Returns our tensor -> its source, for all that the official network has."""
    modules = _modules(project, cfg, net)
    sources = {}
    for name in net.state_dict():
        module, leaf = name.rsplit(".", 1)
        if module in modules:
            sources[name] = _source(project, cfg, module, leaf, modules[module])
    return sources


def _source(project: UNetProject, cfg: UNetConfig, module: str, leaf: str, theirs: str) -> _Source:
    names: tuple[str, ...] = (f"{theirs}.{leaf}",)
    make: Callable[..., Tensor] = _same
    match module.split(".")[-2:]:
        case ["condition", "features"]:
            names, make = (f"{theirs}.freqs",), lambda f: 2 * math.pi * f
        case ["condition", "label"]:
            names, make = (f"{theirs}.weight", f"{theirs}.bias"), _label_rows
        case ["join", "label"]:
            make = _with_null if project == "ldm" else lambda w: _with_null(w.T)
        case ["attention", part] if project == "ncsnpp":
            ends = ("0", "1", "2") if part == "qkv" else ("",)
            letter = {"weight": "W", "bias": "b"}[leaf]
            names, make = tuple(f"{theirs}{end}.{letter}" for end in ends), _stacked
        case ["attention", "qkv"]:
            make = lambda w: _part_first(_flat(w), project, cfg.style.head_width)  # noqa: E731
        case ["attention", "out"]:
            make = _flat
    return _Source(names, make)


def _same(w: Tensor) -> Tensor:
    return w


def _flat(w: Tensor) -> Tensor:
    """Makes a 1x1 convolution a linear map; leaves a bias."""
    return w.flatten(1) if w.ndim > 1 else w


def _label_rows(weight: Tensor, bias: Tensor) -> Tensor:
    """Rows sqrt(K) w_k + b of the classes, then b of the absent one; weight (F, K)."""
    return _with_null(math.sqrt(weight.shape[1]) * weight.T) + bias.reshape(len(weight))


def _stacked(*maps: Tensor) -> Tensor:
    """Makes one map, output first, of several that are input first; or one bias of several."""
    return torch.cat([w.T if w.ndim > 1 else w for w in maps])


def _with_null(rows: Tensor) -> Tensor:
    return torch.cat((rows, torch.zeros_like(rows[:1])))


def _part_first(w: Tensor, project: UNetProject, head_width: int | None) -> Tensor:
    """Puts rows of queries, keys and values in the order (part, head, number)."""
    width = head_width or len(w) // 3
    if project == "edm":
        return w.unflatten(0, (-1, width, 3)).movedim(2, 0).flatten(0, 2)
    return w.unflatten(0, (-1, 3, width)).movedim(1, 0).flatten(0, 2)
