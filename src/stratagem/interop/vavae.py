"""Weights of latent-diffusion autoencoders (LDM's layout, VA-VAE's too) under diffusers' names.

    encoder.down.i.block.j      -> encoder.down_blocks.i.resnets.j
    decoder.up.i.attn.j.q       -> decoder.up_blocks.(L - 1 - i).attentions.j.to_q

LDM counts the decoder's levels from the finest, diffusers in the order they run. LDM's attention
maps are 1 x 1 convolutions, diffusers' the same matrices. Names that are diffusers' already pass,
with those of its older versions. VA-VAE's file also holds parts that only its training needs
(arXiv 2501.01423): losses and the map to a foundation model's features.

`layout` reads the sizes of the network off the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stratagem.errors import InputError

__all__ = ["layout", "rename"]

_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_TRAINING_ONLY = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")
_RULES = [
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.attn\.", r"encoder.down_blocks.\1.attentions."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.up\.(\d+)\.attn\.", r"decoder.up_blocks.\1.attentions."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", r".mid_block.attentions.0."),
    (r"coder\.norm_out\.", r"coder.conv_norm_out."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.(?:q|query)\.", r"\1.to_q."),
    (r"(attentions\.\d+)\.(?:k|key)\.", r"\1.to_k."),
    (r"(attentions\.\d+)\.(?:v|value)\.", r"\1.to_v."),
    (r"(attentions\.\d+)\.(?:proj_out|proj_attn)\.", r"\1.to_out.0."),
]


def rename(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of an autoencoder under diffusers' names.

    Raises:
        InputError: If there are tensors that are neither an autoencoder's nor its training's.

    Example:
        >>> import torch
        >>> list(rename({"decoder.up.0.block.2.conv1.weight": torch.zeros(1)}))
        ['decoder.up_blocks.0.resnets.2.conv1.weight']
    """
    odd = [name for name in weights if not name.startswith((*_PARTS, *_TRAINING_ONLY))]
    if odd:
        raise InputError(f"these are not the weights of an autoencoder: they have {odd[0]}")
    levels = {m[1] for name in weights if (m := re.match(r"decoder\.up\.(\d+)\.", name))}
    renamed = {}
    for old, tensor in weights.items():
        if not old.startswith(_PARTS):
            continue
        name = re.sub(
            r"^decoder\.up\.(\d+)", lambda m: f"decoder.up.{len(levels) - 1 - int(m[1])}", old
        )
        for pattern, new in _RULES:
            name = re.sub(pattern, new, name)
        square = ".attentions." in name and tensor.ndim == 4
        renamed[name] = tensor[:, :, 0, 0] if square else tensor
    return renamed


def layout(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the arguments of diffusers' AutoencoderKL that has weights of these names and sizes.

    Raises:
        InputError: If they are too few to tell.
    """
    down = re.compile(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight")
    found = [match for name in weights if (match := down.match(name))]
    widths = {int(match[1]): len(weights[match[0]]) for match in found}
    ends = ("encoder.conv_in.weight", "post_quant_conv.weight")
    if not widths or not set(ends) <= set(weights):
        raise InputError(
            f"these are not an autoencoder's weights: {' or '.join(ends)} or its blocks are missing"
        )
    levels = [f"encoder.down_blocks.{level}.attentions.0.to_q.weight" for level in sorted(widths)]
    kinds = ["Attn" if name in weights else "" for name in levels]
    return {
        "in_channels": weights[ends[0]].shape[1],
        "out_channels": weights[ends[0]].shape[1],
        "down_block_types": tuple(f"{kind}DownEncoderBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)),
        "block_out_channels": tuple(width for _, width in sorted(widths.items())),
        "layers_per_block": len(found) // len(widths),
        "latent_channels": len(weights[ends[1]]),
    }
