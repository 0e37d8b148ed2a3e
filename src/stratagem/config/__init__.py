"""A run's configuration: frozen dataclasses, YAML in and out, nothing tolerated that has no effect.

data: out/digits              what to train on
model: {width: 64, ...}       the network, a transformer; or  unet: {style: ncsn++, ...}
memory: {bank: out/bank...}   present: conditioned on snippets
stages: {file: out/stages...} present: one decoder per stage
train: {steps: 1000, ...}
"""

from stratagem.config.reading import dump, load, parse
from stratagem.config.sections import (
    AlignConfig,
    DiffusionConfig,
    MemoryConfig,
    ModelConfig,
    RunConfig,
    StagesConfig,
    UNetModelConfig,
)

__all__ = [
    "AlignConfig",
    "DiffusionConfig",
    "MemoryConfig",
    "ModelConfig",
    "RunConfig",
    "StagesConfig",
    "UNetModelConfig",
    "dump",
    "load",
    "parse",
]
