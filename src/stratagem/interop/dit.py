"""SiT, REPA, LightningDiT and GMem: official state dicts into our transformer.

    ours(x_t, t) = eps - x,  t = 0 clean           theirs(x_t, 1 - t) = x - eps   SiT, LightningDiT,
                                                                                  GMem v2
                                                   theirs(x_t, t) = eps - x       REPA, GMem v1

No wrapper turns their time and velocity round: both are absorbed by the weights. Time enters by
sinusoids and a linear map, and

    cos(f (1 - t)) = cos f cos(f t) + sin f sin(f t)
    sin(f (1 - t)) = sin f cos(f t) - cos f sin(f t)

is an orthogonal map of each pair, so it goes into that linear map; the sign of the velocity goes
into the last one. All else is names, and the order of numbers within a patch. All of them are
trained on the linear path to predict the velocity; nothing in a file says so.

The architecture is read from shapes. Fixed tables (positions, rotations) are compared with ours and
dropped. References: SiT arXiv 2401.08740, REPA arXiv 2410.06940, LightningDiT arXiv 2501.01423,
GMem arXiv 2412.08781.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stratagem.errors import InputError
from stratagem.interop.state_dict import require_match
from stratagem.nets.layers import MAX_PERIOD, TIME_FEATURES, rotary_table, sincos_positions
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.nets.transformer import SIZES, TransformerConfig

__all__ = ["Official", "Project", "convert", "inspect", "reverse_time"]

Project = Literal["gmem", "lightningdit", "sit", "repa"]

_LABEL = "y_embedder.embedding_table.weight"
_MEMORY = "condition_projection.linear.weight"
_PATCH = "x_embedder.proj.weight"
_OUT = "final_layer.linear"
_POSITIONS = "pos_embed"
_ROTATIONS = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
_MODERN = r"blocks\.0\.(norm1|mlp\.w12)\."  # RMSNorm or SwiGLU: LightningDiT's block, not SiT's

# module of ours -> official one
_OUTER = {
    "embed": "x_embedder.proj",
    "condition.time.up": "t_embedder.mlp.0",
    "condition.time.down": "t_embedder.mlp.2",
    "condition.label": "y_embedder.embedding_table",
    "condition.memory": "condition_projection.linear",
    "modulation": "final_layer.adaLN_modulation.1",
    "norm": "final_layer.norm_final",
    "out": _OUT,
}
_BLOCK = {
    "norm_attention": "norm1",
    "norm_mlp": "norm2",
    "attention.qkv": "attn.qkv",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "attention.out": "attn.proj",
    "modulation": "adaLN_modulation.1",
}
_MLP = {
    "swiglu": {"mlp.up": "mlp.w12", "mlp.down": "mlp.w3"},
    "gelu": {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
}


class _Family(NamedTuple):
    """What the networks of one project have in common.

    Attributes:
        title: Its name.
        condition: The tensor that takes the condition.
        projector: Prefix of the head used in training only, or None.
        from_noise: Whether time counts from noise to data, and velocity is data - noise.
    """

    title: str
    condition: str
    projector: str | None
    from_noise: bool


_FAMILIES = {
    "gmem-v1": _Family("GMem v1", _MEMORY, "projectors.0", from_noise=False),
    "gmem-v2": _Family("GMem v2", _MEMORY, "projector.0", from_noise=True),
    "lightningdit": _Family("LightningDiT", _LABEL, None, from_noise=True),
    "sit": _Family("SiT", _LABEL, None, from_noise=True),
    "repa": _Family("REPA", _LABEL, "projectors.0", from_noise=False),
}


@dataclass(frozen=True)
class Official:
    """What an official state dict says of its network.

    Attributes:
        family: Whose it is.
        cfg: Our configuration of the same network.
        depth: Its blocks.
        learn_sigma: Whether it has a second half of output channels, which nobody uses.
    """

    family: _Family
    cfg: TransformerConfig
    depth: int
    learn_sigma: bool


# --- architecture ------------------------------------------------------------------------------


def inspect(
    weights: Mapping[str, Tensor],
    project: Project,
    *,
    heads: int | None = None,
    image_size: int | None = None,
    rope: bool | None = None,
) -> Official:
    """Reads the architecture from the shapes of an official state dict.

    Args:
        weights: By official name.
        project: Whose network it is.
        heads: Number of heads; needed where neither the weights nor a published width tell.
        image_size: Side of x_t; needed where the table of positions is absent.
        rope: Whether attention rotates; needed where only the table of rotations is absent.

    Raises:
        InputError: If it is another project's network, a size can be told from nothing, or a size
            that was given contradicts the weights.
    """
    family = _family(weights, project)
    width, channels, patch, _ = _shape(weights, _PATCH, 4)
    rows, condition_size = _shape(weights, family.condition, 2)
    outputs = _shape(weights, f"{_OUT}.weight", 2)[0]
    by_memory = family.condition == _MEMORY
    blocks = re.compile(r"blocks\.(\d+)\.")
    numbers = [int(m[1]) for name in weights if (m := blocks.match(name))]
    cfg = TransformerConfig(
        image_size=_image_size(weights, patch, image_size),
        channels=channels,
        patch=patch,
        width=width,
        heads=_heads(weights, width, heads),
        num_classes=0 if by_memory else rows - 1,  # the last row is the null class
        memory_dim=condition_size if by_memory else 0,
        norm="rms" if "final_layer.norm_final.weight" in weights else "layer",
        mlp="swiglu" if "blocks.0.mlp.w12.weight" in weights else "gelu",
        rope=_rope(weights, rope),
        qk_norm="blocks.0.attn.q_norm.weight" in weights,
        shift=_shape(weights, "blocks.0.adaLN_modulation.1.weight", 2)[0] != 4 * width,
    )
    learn_sigma = outputs == 2 * cfg.patch_width
    if learn_sigma and not family.from_noise:
        raise InputError(f"{family.title} learns no variance, but these weights do: --from sit?")
    return Official(family, cfg, 1 + max(numbers, default=-1), learn_sigma)


def _family(weights: Mapping[str, Tensor], project: Project) -> _Family:
    own, other = (_MEMORY, _LABEL) if project == "gmem" else (_LABEL, _MEMORY)
    if own not in weights and other in weights:
        hint = "gmem" if other == _MEMORY else "lightningdit, sit or repa"
        raise InputError(f"these are no weights of {project}, they have {other}: try --from {hint}")
    if project == "sit" and _has(weights, r"projectors\."):
        raise InputError("these weights have projectors, SiT has none: try --from repa")
    if project != "gmem":
        return _FAMILIES[project]
    if _has(weights, rf"projector\.|feat_rope\.|{_MODERN}"):
        return _FAMILIES["gmem-v2"]
    if _has(weights, r"projectors\."):
        return _FAMILIES["gmem-v1"]
    raise InputError(
        "these weights do not tell GMem v1 from v2, whose times run against each other: keep the "
        "projector in the file"
    )


def _has(weights: Mapping[str, Tensor], pattern: str) -> bool:
    return any(re.match(pattern, name) for name in weights)


def _shape(weights: Mapping[str, Tensor], name: str, rank: int) -> torch.Size:
    if name not in weights or weights[name].ndim != rank:
        first = ", ".join(list(weights)[:3])
        raise InputError(f"no {name} with {rank} axes in these weights, which begin with {first}")
    return weights[name].shape


def _image_size(weights: Mapping[str, Tensor], patch: int, given: int | None) -> int:
    found = None
    if _POSITIONS in weights:
        found = math.isqrt(_shape(weights, _POSITIONS, 3)[1]) * patch
    elif _ROTATIONS[0] in weights:
        found = math.isqrt(_shape(weights, _ROTATIONS[0], 2)[0]) * patch
    return _settle("--image-size", given, found)


def _heads(weights: Mapping[str, Tensor], width: int, given: int | None) -> int:
    for name in (_ROTATIONS[0], "blocks.0.attn.q_norm.weight"):
        if name in weights:
            return _settle("--heads", given, width // max(1, weights[name].shape[-1]))
    if given is not None:
        return given
    published = {size.width: size.heads for size in SIZES.values()}
    return _settle("--heads", given, published.get(width), f"width {width} is no published one, ")


def _settle(option: str, given: int | None, found: int | None, why: str = "") -> int:
    """Returns what is given or found, which must not contradict each other."""
    if given is not None and found is not None and given != found:
        raise InputError(f"{option} {given} contradicts the weights, which say {found}")
    number = found if given is None else given
    if number is None:
        raise InputError(f"{why}and the weights do not tell: give {option}".removeprefix("and "))
    return number


def _rope(weights: Mapping[str, Tensor], given: bool | None) -> bool:
    """LightningDiT's published networks rotate; a table of positions alone leaves it open."""
    if _has(weights, r"feat_rope\."):
        if given is False:
            raise InputError("--rope no contradicts the weights, which hold rotations")
        return True
    modern = _has(weights, _MODERN)
    if given is None and modern and _POSITIONS in weights:
        raise InputError(
            "the weights hold positions but no rotations: give --rope no if the network has none, "
            "--rope yes if they were left out"
        )
    return modern if given is None else given


# --- weights -----------------------------------------------------------------------------------


def convert(
    weights: Mapping[str, Tensor], official: Official, net: MultiDecoder
) -> dict[str, Tensor]:
    """Returns the weights as a state dict of our network, float32.

    Args:
        weights: By official name.
        official: Of `inspect`.
        net: A network of the same configuration with one decoder, wherever its depth is cut; only
            its shapes are used, so it may lie on the meta device.

    Raises:
        InputError: If a weight is missing, unexpected or mis-shaped, or a fixed table is not ours.
    """
    ours = net.state_dict()
    names = _names(ours, official.cfg)
    tables = {_POSITIONS, *(_ROTATIONS if official.cfg.rope else ())}
    head = official.family.projector
    own = {
        name: tensor
        for name, tensor in weights.items()
        if name not in tables and not (head and name.startswith(f"{head}."))
    }
    wanted = {name: _official_shape(name, ours[names[name]].shape, official) for name in names}
    require_match(own, wanted, _describe(official))
    _check_tables(weights, official.cfg)
    return {names[name]: _translate(name, t, official).float() for name, t in own.items()}


def reverse_time(weight: Tensor) -> Tensor:
    """Turns the first map of a time embedding round: it then does at t what it did at 1 - t.

    Args:
        weight: Of the map of (cos, sin) features, shape (W, 256).

    Example:
        >>> w = torch.randn(3, 256, dtype=torch.float64)
        >>> torch.allclose(reverse_time(reverse_time(w)), w)
        True
    """
    half = TIME_FEATURES // 2
    omega = MAX_PERIOD ** -(torch.arange(half, dtype=torch.float64, device=weight.device) / half)
    f = omega.float().double()  # the network's own are float32
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    parts = (of_cos * f.cos() + of_sin * f.sin(), of_cos * f.sin() - of_sin * f.cos())
    return torch.cat(parts, dim=1).to(weight.dtype)


def _names(ours: Mapping[str, Tensor], cfg: TransformerConfig) -> dict[str, str]:
    """Official name -> ours."""
    block = re.compile(r"stack\.blocks\.(\d+)\.(.*)")
    inner = _BLOCK | _MLP[cfg.mlp]
    shared = len({m[1] for n in ours if (m := re.match(r"encoder\.stack\.blocks\.(\d+)", n))})
    names = {}
    for name in ours:
        start = 0 if name.startswith("encoder.") else shared
        module, leaf = re.sub(r"^(encoder|decoders\.0)\.", "", name).rsplit(".", 1)
        if match := block.fullmatch(module):
            names[f"blocks.{start + int(match[1])}.{inner[match[2]]}.{leaf}"] = name
        else:
            names[f"{_OUTER[module]}.{leaf}"] = name
    return names


def _official_shape(name: str, ours: torch.Size, official: Official) -> torch.Size:
    cfg = official.cfg
    if name == _PATCH:
        return torch.Size((cfg.width, cfg.channels, cfg.patch, cfg.patch))
    if name.startswith(f"{_OUT}.") and official.learn_sigma:
        return torch.Size((2 * ours[0], *ours[1:]))
    return ours


def _translate(name: str, weight: Tensor, official: Official) -> Tensor:
    """Puts the numbers of one weight in our order and our direction of time."""
    cfg, turned = official.cfg, official.family.from_noise
    if name == _PATCH:  # a convolution over (channel, row, column)
        return weight.permute(0, 2, 3, 1).flatten(1)
    if name == "t_embedder.mlp.0.weight" and turned:
        return reverse_time(weight.float())
    if name.startswith(f"{_OUT}."):  # of each pixel, the channels of the velocity come first
        velocity = weight.unflatten(0, (cfg.patch**2, -1))[:, : cfg.channels].flatten(0, 1)
        return -velocity if turned else velocity
    return weight


def _check_tables(weights: Mapping[str, Tensor], cfg: TransformerConfig) -> None:
    """Refuses fixed tables other than those that our network computes."""
    ours = {_POSITIONS: sincos_positions(cfg.width, cfg.grid)[None]}
    if cfg.rope:
        cos, sin = rotary_table(cfg.head_width, cfg.grid)
        pairs = sin.unflatten(-1, (-1, 2))[..., 1:]  # the first of a pair has a minus in ours
        ours |= dict(zip(_ROTATIONS, (cos, pairs.expand(-1, -1, 2).flatten(-2)), strict=True))
    for name, table in ours.items():
        theirs = weights.get(name)
        if theirs is None:
            continue
        tolerance = max(1e-4, 2 * torch.finfo(theirs.dtype).eps)
        if theirs.shape != table.shape or not torch.allclose(
            theirs.float(), table, rtol=0, atol=tolerance
        ):
            raise InputError(
                f"{name} is not the fixed table of a {cfg.grid}x{cfg.grid} grid: networks with "
                "learned or resized positions cannot be imported"
            )


def _describe(official: Official) -> str:
    cfg = official.cfg
    return f"{official.family.title} of width {cfg.width}, depth {official.depth}, {cfg.mlp} MLP"
