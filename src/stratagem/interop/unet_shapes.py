"""Official U-Nets: their sizes, read from the names and shapes of their weights.

    levels      the blocks between two changes of the sides; width and attention of each block
    decoders    the width of each decoder's first block, and at which levels it attends

What no weight shows must be told: the side of the images (EDM's names hold it), the groups of group
norms, the width of attention heads, and where the original cuts the noise axis. The published
values stand in `FAMILIES`. A network that is not as its first blocks say is refused later, when
every weight has to find its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor

from stratagem.errors import InputError
from stratagem.interop.unet import UNetProject
from stratagem.nets.unet import UNetConfig
from stratagem.nets.unet_style import STYLES

__all__ = ["FAMILIES", "OfficialUNet", "UNetSource", "inspect_unet"]

UNetSource = Literal["edm", "multistage-edm", "ncsnpp-multistage", "ldm-multistage"]


class _Family(NamedTuple):
    """What the published networks of one project have in common.

    Attributes:
        title: Its name.
        project: Whose names its weights have.
        norm_groups: Most groups of a group norm.
        cuts: Where the noise axis is cut: EDM's sigma, NCSN++'s t, LDM's number of a step.
    """

    title: str
    project: UNetProject
    norm_groups: int
    cuts: tuple[float, ...]


FAMILIES = {
    "edm": _Family("EDM", "edm", 32, ()),
    "multistage-edm": _Family("multistage EDM", "edm", 16, (2.5103, 7.6577)),
    "ncsnpp-multistage": _Family("multistage NCSN++", "ncsnpp", 16, (0.442, 0.6308)),
    "ldm-multistage": _Family("multistage LDM", "ldm", 32, (442.0, 631.0)),
}

_Levels = list[list[tuple[int, bool]]]  # of each block: width, whether it attends


@dataclass(frozen=True)
class OfficialUNet:
    """What official weights say of their network.

    Attributes:
        family: Whose it is.
        style: Name of the style that `cfg.style` varies.
        cfg: Our configuration of the encoder and all decoders.
        widths: Width of each decoder.
        attention: Sides at which each decoder attends, or None where all attend as the encoder.
        cuts: Where the noise axis is cut, in the original's unit.
    """

    family: _Family
    style: Literal["ddpm++", "ncsn++", "adm", "ldm"]
    cfg: UNetConfig
    widths: tuple[int, ...]
    attention: tuple[tuple[int, ...], ...] | None = None
    cuts: tuple[float, ...] = ()


def inspect_unet(
    weights: Mapping[str, Tensor],
    source: UNetSource,
    *,
    image_size: int | None = None,
    norm_groups: int | None = None,
    head_width: int | None = None,
    cuts: tuple[float, ...] = (),
) -> OfficialUNet:
    """Reads the sizes of a network from its official weights.

    Args:
        weights: By official name.
        source: Whose network it is.
        image_size: Side of x_t; needed but for EDM's.
        norm_groups: Most groups of a group norm, where they are not the published ones.
        head_width: Width of an attention head, where it is not the published one.
        cuts: Where the noise axis is cut, where it is not the published place.

    Raises:
        InputError: If it is another project's network, or a size is missing, has no effect or
            contradicts the weights.
    """
    family = FAMILIES[source]
    family = family._replace(norm_groups=norm_groups or family.norm_groups)
    read = {"edm": _edm, "ncsnpp": _ncsnpp, "ldm": _ldm}[family.project]
    own = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    try:
        found = read(own, image_size, family)
    except (KeyError, IndexError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else "they hold no blocks"
        raise InputError(f"these are not the weights of {family.title}: {what}") from None
    if head_width is not None:
        if found.cfg.style.head_width is None:
            raise InputError(f"--head-width has no effect: {family.title} has one head")
        like = replace(found.cfg.style, head_width=head_width)
        found = replace(found, cfg=replace(found.cfg, style=like))
    cuts = cuts or family.cuts
    if len(cuts) != len(found.widths) - 1:
        raise InputError(
            f"{family.title} of {len(found.widths)} decoders has {len(found.widths) - 1} cuts "
            f"between them, not {len(cuts)}: give them with --cuts"
        )
    return replace(found, cuts=cuts)


def _num(weights: Mapping[str, Tensor], pattern: str) -> int:
    """Returns 1 + the largest number that a pattern finds at the start of a name; 0 for none."""
    numbers = (int(match[1]) for name in weights if (match := re.match(pattern, name)))
    return 1 + max(numbers, default=-1)


def _config(
    stem: Tensor, side: int, levels: _Levels, condition: Tensor, family: _Family, style: str
) -> UNetConfig:
    width = len(stem)
    return UNetConfig(
        image_size=side,
        channels=stem.shape[1],
        width=width,
        mults=tuple(max(1, level[0][0] // width) if level else 1 for level in levels),
        blocks=len(levels[0]),
        attention=tuple(side >> n for n, level in enumerate(levels) if any(a for _, a in level)),
        style=replace(STYLES[style], norm_groups=family.norm_groups),
        condition_mult=len(condition) // width,
    )


def _edm(w: Mapping[str, Tensor], image_size: int | None, family: _Family) -> OfficialUNet:
    places = {int(match[1]) for name in w if (match := re.match(r"enc\.(\d+)x", name))}
    sides = sorted(places, reverse=True)
    if image_size not in {None, sides[0]}:
        raise InputError(f"--image-size {image_size} contradicts the weights: {sides[0]}")
    levels: _Levels = []
    for s in sides:
        names = [f"enc.{s}x{s}_block{i}" for i in range(_num(w, rf"enc\.{s}x{s}_block(\d+)\."))]
        levels.append([(len(w[f"{n}.conv0.weight"]), f"{n}.qkv.weight" in w) for n in names])
    low = f"{sides[-1]}x{sides[-1]}"
    pyramid, adm = f"enc.{low}_aux_residual.weight" in w, "out_conv.weight" in w
    style: Literal["ddpm++", "ncsn++", "adm"] = "ncsn++" if pyramid else "adm" if adm else "ddpm++"
    stem = w[f"enc.{sides[0]}x{sides[0]}_conv.weight"]
    cfg = _config(stem, sides[0], levels, w["map_layer1.weight"], family, style)
    staged = _num(w, r"decs\.(\d+)\.")
    tops = [f"decs.{k}" for k in range(staged)] or ["dec"]
    classes = w["map_label.weight"].shape[1] if "map_label.weight" in w else 0
    time: Literal["fourier", "cos-sin", "sin-cos"] = "cos-sin" if adm else "sin-cos"
    like = replace(cfg.style, time="fourier" if "map_noise.freqs" in w else time)
    like = replace(like, time_features=w["map_layer0.weight"].shape[1] // cfg.width)
    return OfficialUNet(
        family,
        style,
        replace(cfg, num_classes=classes, shared_middle=staged == 0, style=like),
        tuple(len(w[f"{top}.{low}_block0.conv0.weight"]) // cfg.mults[-1] for top in tops),
    )


def _ncsnpp(w: Mapping[str, Tensor], image_size: int | None, family: _Family) -> OfficialUNet:
    levels: _Levels = [[]]
    for i in range(3, _num(w, r"en_modules\.(\d+)\.") - 3):  # between the stem and the middle
        if f"en_modules.{i}.Conv2d_0.weight" in w:  # the pyramid: the last block halved the sides
            levels[-1].pop()
            levels.append([])
        elif f"en_modules.{i}.NIN_0.W" in w:
            levels[-1][-1] = (levels[-1][-1][0], True)
        else:
            levels[-1].append((len(w[f"en_modules.{i}.Conv_0.weight"]), False))
    side, stem = _told(image_size), w["en_modules.2.weight"]
    cfg = _config(stem, side, levels, w["en_modules.1.weight"], family, "ncsn++")
    like = replace(cfg.style, time="sin-cos", time_features=1)
    num = _num(w, r"de_modules\.(\d+)\.")
    widths = (len(w[f"de_modules.{k}.0.Conv_0.weight"]) // cfg.mults[-1] for k in range(num))
    return OfficialUNet(family, "ncsn++", replace(cfg, style=like), tuple(widths))


def _ldm(w: Mapping[str, Tensor], image_size: int | None, family: _Family) -> OfficialUNet:
    levels: _Levels = [[]]
    for i in range(1, _num(w, r"input_blocks\.(\d+)\.")):
        group = f"input_blocks.{i}"
        if f"{group}.0.op.weight" in w:
            levels.append([])
        else:
            width = len(w[f"{group}.0.in_layers.2.weight"])
            levels[-1].append((width, f"{group}.1.qkv.weight" in w))
    side, stem = _told(image_size), w["input_blocks.0.0.weight"]
    cfg = _config(stem, side, levels, w["time_embed.2.weight"], family, "ldm")
    num = _num(w, r"de_modules\.(\d+)\.")
    last = len(levels) - 1
    first = {s: (cfg.blocks + 1) * (last - level) for level, s in enumerate(cfg.sides)}  # group
    attention = tuple(
        tuple(s for s, n in first.items() if f"de_modules.{k}.{n}.1.qkv.weight" in w)
        for k in range(num)
    )
    widths = (len(w[f"de_modules.{k}.0.0.in_layers.2.weight"]) // cfg.mults[-1] for k in range(num))
    everywhere = {s for sides in (cfg.attention, *attention) for s in sides}
    block = "middle_block.0"
    scaled = len(w[f"{block}.emb_layers.1.weight"]) == 2 * len(w[f"{block}.in_layers.2.weight"])
    cfg = replace(
        cfg,
        attention=tuple(s for s in cfg.sides if s in everywhere),
        style=replace(cfg.style, modulation="scale-shift" if scaled else "add"),
        num_classes=len(w["label_emb.weight"]) if "label_emb.weight" in w else 0,
    )
    lost = any(set(sides) != everywhere for sides in attention)
    return OfficialUNet(family, "ldm", cfg, tuple(widths), attention if lost else None)


def _told(image_size: int | None) -> int:
    if image_size is None:
        raise InputError("the weights do not tell the side of the images: give --image-size")
    return image_size
