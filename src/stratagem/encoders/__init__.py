"""Frozen encoders: what turns images into the vectors of a memory bank.

An encoder is anything with a name, a dimension, a description and a call on uint8 images:

    pixels   area means of at most 16 x 16 cells; for digits and tiny images
    effnet   EfficientNet-Lite0 trained on ImageNet, whose weights come with a Python package
    dino     DINOv2 and DINOv3 in three sizes through transformers, with weights that the user has
    module   any torch module of your own, see `ModuleEncoder`

A frozen network needs no gradient, no training mode and no batch statistics, so a vector depends on
its image alone, up to the rounding of sums. The description holds all that makes the vectors; two
banks may be mixed only if theirs are equal.
"""

from __future__ import annotations

from stratagem.encoders.base import Encoder, Preprocessing, TokenEncoder
from stratagem.encoders.build import EncoderName, build_encoder, build_token_encoder
from stratagem.encoders.dino import load_dino
from stratagem.encoders.effnet import EfficientNetLite0, weights_path
from stratagem.encoders.module import ModuleEncoder, Pool
from stratagem.encoders.pixels import PixelEncoder

__all__ = [
    "EfficientNetLite0",
    "Encoder",
    "EncoderName",
    "ModuleEncoder",
    "PixelEncoder",
    "Pool",
    "Preprocessing",
    "TokenEncoder",
    "build_encoder",
    "build_token_encoder",
    "load_dino",
    "weights_path",
]
