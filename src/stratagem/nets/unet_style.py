"""What makes one published family of U-Nets different from another.

    ddpm++, ncsn++   Song et al. 2021, arXiv:2011.13456, as in Karras et al. 2022, arXiv:2206.00364
    adm              Dhariwal and Nichol 2021, arXiv:2105.05233
    ldm              Rombach et al. 2022, arXiv:2112.10752

All four are one network (see `unet` and `unet_blocks`) under the options of a `Style`; sizes are
not among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stratagem.errors import InputError

__all__ = ["STYLES", "Style", "TimeKind", "style"]

TimeKind = Literal["sin-cos", "cos-sin", "fourier"]


@dataclass(frozen=True)
class Style:
    """What makes one published family of U-Nets different from another; the defaults are DDPM++'s.

    Attributes:
        time: Sinusoids of the time: (sin, cos) of time / 10000^(k / (n-1)), (cos, sin) of
            time / 10000^(k / n), or (sin, cos) of random frequencies; k = 0 .. n-1.
        time_features: Number of sinusoids over the network's width.
        label_at: Whether the label joins the sinusoids or the embedding that comes out of them.
        modulation: How the condition enters a block.
        scale: The factor r after each sum, also in the pyramid.
        resample: Whether sides change within a block or by a convolution of their own.
        fir: Whether blocks change sides through the filter [1 3 3 1], or by mean and repetition.
        skip_resampled: Whether a block that changes sides has a 1x1 convolution on its shortcut.
        pyramid: Whether smaller and smaller copies of the input join the encoder's levels.
        attend: Whether of a decoder's level each block attends, or the last one.
        head_width: Width of an attention head; None for one head.
        norm_groups: Most groups of a group norm.
        norm_width: Fewest channels of a group.
        norm_eps: Added to a group's variance.
    """

    time: TimeKind = "sin-cos"
    time_features: int = 1
    label_at: Literal["features", "embedding"] = "features"
    modulation: Literal["add", "scale-shift"] = "add"
    scale: float = math.sqrt(0.5)
    resample: Literal["block", "convolution"] = "block"
    fir: bool = False
    skip_resampled: bool = True
    pyramid: bool = False
    attend: Literal["each", "last"] = "last"
    head_width: int | None = None
    norm_groups: int = 32
    norm_width: int = 4
    norm_eps: float = 1e-6


STYLES = {
    "ddpm++": Style(),
    "ncsn++": Style(time="fourier", time_features=2, fir=True, pyramid=True),
    "adm": Style(
        time="cos-sin",
        label_at="embedding",
        modulation="scale-shift",
        scale=1.0,
        skip_resampled=False,
        attend="each",
        head_width=64,
        norm_eps=1e-5,
    ),
    "ldm": Style(
        time="cos-sin",
        label_at="embedding",
        scale=1.0,
        resample="convolution",
        attend="each",
        head_width=32,
        norm_width=1,
        norm_eps=1e-5,
    ),
}


def style(name: str) -> Style:
    """Returns the published style of a name.

    Raises:
        InputError: If there is no such style.

    Example:
        >>> style("adm").modulation
        'scale-shift'
    """
    if name not in STYLES:
        raise InputError(f"unknown U-Net style {name!r}: choose one of {', '.join(STYLES)}")
    return STYLES[name]
