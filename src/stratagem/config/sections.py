"""The sections of a run's configuration, as frozen dataclasses; each setting is documented here.

A section that is absent turns its idea off: no `memory`, no bank; no `stages`, one decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stratagem.config.checks import check
from stratagem.train import TrainConfig

__all__ = [
    "AlignConfig",
    "DiffusionConfig",
    "MemoryConfig",
    "ModelConfig",
    "RunConfig",
    "StagesConfig",
]


@dataclass(frozen=True)
class ModelConfig:
    """The transformer.

    Attributes:
        width: Numbers per token.
        depth: Blocks that an image passes; with stages, those of the deepest stage.
        heads: Attention heads.
        patch: Side of a patch in pixels.
        style: "sit" (LayerNorm, GELU) or "lightningdit" (RMSNorm, SwiGLU, rotary positions).
        labels: Whether the class label is a condition.
        norm: "layer" or "rms"; absent: the style's.
        mlp: "gelu" or "swiglu"; absent: the style's.
        rope: Whether attention rotates by position; absent: the style's.
        qk_norm: Whether attention normalises queries and keys.
        shift: Whether the condition shifts in the blocks, or only scales.
        init: "adaln-zero" starts every block as the identity; "gmem" does not.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 2
    style: Literal["sit", "lightningdit"] = "lightningdit"
    labels: bool = False
    norm: Literal["layer", "rms"] | None = None
    mlp: Literal["gelu", "swiglu"] | None = None
    rope: bool | None = None
    qk_norm: bool = False
    shift: bool = True
    init: Literal["adaln-zero", "gmem"] = "adaln-zero"


@dataclass(frozen=True)
class DiffusionConfig:
    """The path between image and noise.

    Attributes:
        schedule: "linear" (flow), "cosine", "vp" or "edm".
        parameterization: What the network predicts.
        density: Where training draws t: "uniform", "logit-normal", or "log-normal" in sigma/alpha.
        density_mean: Mean of the normal inside the density.
        density_std: Its standard deviation.
    """

    schedule: Literal["linear", "cosine", "vp", "edm"] = "linear"
    parameterization: Literal["v", "eps", "x", "edm"] = "v"
    density: Literal["uniform", "logit-normal", "log-normal"] = "logit-normal"
    density_mean: float = 0.0
    density_std: float = 1.0


@dataclass(frozen=True)
class MemoryConfig:
    """Conditioning on snippets.

    Attributes:
        bank: The memory bank, made from the same data set.
        dropout: Rate at which numbers of a snippet are zeroed in training.
        place: Where they are zeroed: "before" the projection (GMem v2) or "after" it (v1).
        jitter: Gaussian noise on the snippet, relative to the size of its numbers.
        scale: "unit-variance" multiplies a snippet of D numbers by sqrt(D); "unit-norm" (GMem's)
            leaves it as it is, a far weaker signal beside the time.
    """

    bank: str
    dropout: float = 0.4
    place: Literal["before", "after"] = "before"
    jitter: float = 0.0
    scale: Literal["unit-variance", "unit-norm"] = "unit-variance"


@dataclass(frozen=True)
class AlignConfig:
    """Alignment of early tokens with those of a frozen encoder (REPA, arXiv 2410.06940).

    Attributes:
        encoder: Name of the frozen encoder.
        block: The tokens after this many blocks are aligned, at least 1.
        hidden: Width of the head's hidden layers.
        cache: Whether the encoder's tokens of all images are made once and kept in float16; else
            they are made anew for each batch.
    """

    encoder: str = "effnet"
    block: int = 4
    hidden: int = 2048
    cache: bool = True


@dataclass(frozen=True)
class StagesConfig:
    """One decoder per stage.

    Attributes:
        file: The stages, made from the same data set.
        shared: Blocks of the encoder, which all stages share.
        depths: Blocks of each stage's decoder, from the data to the noise; absent: all equal.
    """

    file: str
    shared: int
    depths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class RunConfig:
    """Everything that makes a run.

    Attributes:
        data: The data set artifact.
        seed: Of everything random.
        model: The network.
        diffusion: The path.
        memory: The bank; absent for none.
        stages: The stages; absent for one.
        align: The alignment; absent for none.
        train: The training.
    """

    data: str
    seed: int = 0
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    memory: MemoryConfig | None = None
    stages: StagesConfig | None = None
    align: AlignConfig | None = None
    train: TrainConfig = TrainConfig()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        check(self)
