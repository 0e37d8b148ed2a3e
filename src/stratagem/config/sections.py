"""The sections of a run's configuration, as frozen dataclasses; each setting is documented here.

A section that is absent turns its idea off: no `memory`, no bank; no `stages`, one decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stratagem.config.checks import check
from stratagem.tailor import Measure
from stratagem.train import TrainConfig

__all__ = [
    "AlignConfig",
    "DiffusionConfig",
    "MemoryConfig",
    "ModelConfig",
    "RunConfig",
    "StagesConfig",
    "UNetModelConfig",
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
class UNetModelConfig:
    """The U-Net that stands in the transformer's place.

    It is told ln(sigma / alpha) / 4 under parameterization edm, and else 999 t, the number of a
    step of a thousand (or t itself, where `time` is fourier).

    Attributes:
        style: "ddpm++", "ncsn++", "adm" or "ldm": the family, see `nets.unet_style`.
        width: Channels of the stem.
        mults: Channels of each level over the width; each level halves the sides.
        blocks: Blocks of an encoder's level; a decoder's has one more.
        attention: Sides at which blocks attend.
        dropout: Rate in the blocks in training.
        labels: Whether the class label is a condition.
        time: Sinusoids of the time; absent: the style's.
        modulation: How the condition enters a block; absent: the style's.
        norm_groups: Most groups of a group norm; absent: the style's.
        head_width: Width of an attention head; absent: the style's.
        condition_mult: Width of the condition over the width.
    """

    style: Literal["ddpm++", "ncsn++", "adm", "ldm"] = "ddpm++"
    width: int = 128
    mults: tuple[int, ...] = (2, 2, 2)
    blocks: int = 4
    attention: tuple[int, ...] = (16,)
    dropout: float = 0.0
    labels: bool = False
    time: Literal["sin-cos", "cos-sin", "fourier"] | None = None
    modulation: Literal["add", "scale-shift"] | None = None
    norm_groups: int | None = None
    head_width: int | None = None
    condition_mult: int = 4


@dataclass(frozen=True)
class DiffusionConfig:
    """The path between image and noise.

    Attributes:
        schedule: "linear" (flow), "cosine", "vp", "edm", or "sqrt-linear" (LDM's steps).
        parameterization: What the network predicts.
        density: Where training draws t: "uniform", "logit-normal", or "log-normal" in sigma/alpha.
        density_mean: Mean of the normal inside the density.
        density_std: Its standard deviation.
    """

    schedule: Literal["linear", "cosine", "vp", "edm", "sqrt-linear"] = "linear"
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
        encoder: Name of the frozen encoder: effnet, dinov2-b or the like.
        weights: Of DINOv2 and DINOv3: a folder, or a repository of the hub.
        size: Side to which the encoder scales images; absent: 64 for effnet, 224 for the others.
        images: For training on latents: the data set of images that they were made of.
        block: The tokens after this many blocks are aligned, at least 1.
        hidden: Width of the head's hidden layers.
        cache: Whether the encoder's tokens of all images are made once and kept in float16; else
            they are made anew for each batch.
    """

    encoder: str = "effnet"
    weights: str | None = None
    size: int | None = None
    images: str | None = None
    block: int = 4
    hidden: int = 2048
    cache: bool = True


@dataclass(frozen=True)
class StagesConfig:
    """One decoder per stage. Lists run from the data to the noise; one of file and edges is given.

    Attributes:
        file: The stages, made from the same data set.
        shared: Blocks of the transformer's encoder, which all stages share.
        depths: Blocks of each transformer decoder; absent: all equal.
        widths: Width of each decoder; absent: the encoder's.
        attention: Sides at which each U-Net decoder attends; absent: the encoder's. The published
            multistage LDM lost its attention in all decoders but the first.
        shared_middle: Whether the U-Net's middle is the encoder's, or each decoder has its own.
        form: "tailored": what this section says. The others are what it is compared with, by this
            one setting: "equal", all decoders of the network's own size; "separate", for each
            stage a whole network, encoder included; "unified", one network for all stages.
        edges: The log-SNRs that part the stages, decreasing.
        budget: MACs of a call over those of the unified network, in the mean: the decoders' sizes
            are chosen for it, see `tailor`; absent: they are what this section says.
        measure: What the mean counts: training "draws", or a sampler's "calls".
        policy: Which share of a batch each stage has: the density's mass ("density"), all the same
            ("uniform"), or what the measured loss asks for ("loss", see `stage_draw`).
        unbiased: Whether rows are weighed so that the expected loss stays the density's.
        batch: "mixed": every batch holds all stages; "single": each step has one.
        warm_steps: For so many steps the largest decoder serves all stages; then it is copied
            into the others, see `nets.warm_start`.
        tie: Share of the other decoders' gradients that a copied weight adds to its own after the
            warm start: 0 parts the decoders at once, near 1 they hardly part.
    """

    file: str | None = None
    shared: int | None = None
    depths: tuple[int, ...] | None = None
    widths: tuple[int, ...] | None = None
    attention: tuple[tuple[int, ...], ...] | None = None
    shared_middle: bool = True
    form: Literal["tailored", "equal", "separate", "unified"] = "tailored"
    edges: tuple[float, ...] | None = None
    budget: float | None = None
    measure: Measure = "draws"
    policy: Literal["density", "uniform", "loss"] = "density"
    unbiased: bool = False
    batch: Literal["mixed", "single"] = "mixed"
    warm_steps: int = 0
    tie: float = 0.8


@dataclass(frozen=True)
class RunConfig:
    """Everything that makes a run.

    Attributes:
        data: The data set artifact.
        seed: Of everything random.
        model: The network, a transformer.
        unet: The network, a U-Net; then there is no model.
        diffusion: The path.
        memory: The bank; absent for none.
        stages: The stages; absent for one.
        align: The alignment; absent for none.
        train: The training.
    """

    data: str
    seed: int = 0
    model: ModelConfig = ModelConfig()
    unet: UNetModelConfig | None = None
    diffusion: DiffusionConfig = DiffusionConfig()
    memory: MemoryConfig | None = None
    stages: StagesConfig | None = None
    align: AlignConfig | None = None
    train: TrainConfig = TrainConfig()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        check(self)

    @property
    def labels(self) -> bool:
        """Whether the class label is a condition of the network."""
        return (self.unet or self.model).labels
