"""A run's configuration: frozen dataclasses, YAML in and out, nothing tolerated that has no effect.

    data: out/digits              what to train on
    model: {width: 64, ...}       the network
    memory: {bank: out/bank...}   present: conditioned on snippets
    stages: {file: out/stages...} present: one decoder per stage
    train: {steps: 1000, ...}

Unknown keys, wrong types and impossible values end with one line that names the key, the value and
the nearest known key. YAML 1.1 reads `1e-4` as text; here it is a number where a number is wanted.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from stratagem.errors import InputError
from stratagem.train import TrainConfig

__all__ = [
    "AlignConfig",
    "DiffusionConfig",
    "MemoryConfig",
    "ModelConfig",
    "RunConfig",
    "StagesConfig",
    "dump",
    "load",
    "parse",
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
        _check(self)


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies `section.key=value` overrides, whose values are YAML too.

    Raises:
        InputError: If the file is missing, is no YAML mapping, or does not fit.
    """
    if not path.is_file():
        raise InputError(f"no configuration at {path}: the file does not exist")
    try:
        body = yaml.safe_load(path.read_text()) or {}
        if not isinstance(body, dict):
            raise InputError(f"{path}: expected `key: value` lines, found {type(body).__name__}")
        for override in overrides:
            _override(body, override)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not valid YAML: {reason}") from error
    return parse(body, str(path))


def parse(body: Mapping[str, Any], where: str = "configuration") -> RunConfig:
    """Makes a RunConfig of plain mappings, strictly.

    Raises:
        InputError: If a key is unknown, missing or of the wrong type, or a value impossible.

    Example:
        >>> parse({"data": "digits", "train": {"learning_rate": "1e-4"}}).train.learning_rate
        0.0001
        >>> parse({"data": "digits", "train": {"step": 5}}, "a.yaml")
        Traceback (most recent call last):
        ...
        stratagem.errors.InputError: a.yaml: unknown key train.step; did you mean train.steps?
    """
    try:
        return _dataclass(RunConfig, body, "")
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def dump(config: RunConfig) -> str:
    """Writes a configuration as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    return list(value) if isinstance(value, tuple) else value


def _override(body: dict[str, Any], text: str) -> None:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise InputError(f"--set {text!r}: expected section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        body = body.setdefault(section, {})
        if not isinstance(body, dict):
            raise InputError(f"--set {text!r}: {section} is not a section")
    body[last] = yaml.safe_load(value)


def _dataclass(cls: type[Any], body: Any, path: str) -> Any:
    if not isinstance(body, Mapping):
        raise InputError(
            f"{path.rstrip('.')} must be a section of `key: value` lines, not {body!r}"
        )
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in body:
        if key not in fields:
            raise InputError(f"unknown key {path}{key}{_nearest(str(key), list(fields), path)}")
    for name, field in fields.items():
        if name not in body and field.default is dataclasses.MISSING:
            raise InputError(f"{path}{name} is missing")
    return cls(**{key: _value(hints[key], value, f"{path}{key}") for key, value in body.items()})


def _nearest(key: str, known: Sequence[str], path: str) -> str:
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {path}{match[0]}?" if match else f"; known are {', '.join(known)}"


def _value(hint: Any, value: Any, path: str) -> Any:
    """Converts one YAML value to the type of its field, or says why it cannot be."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        rest = next(a for a in arguments if a is not type(None))
        return None if value is None else _value(rest, value, path)
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast(type[Any], hint), value, path + ".")
    if origin is Literal:
        if value not in arguments:
            choices = ", ".join(map(str, arguments))
            raise InputError(f"{path} is {value!r}: choose one of {choices}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{path} must be a list, not {value!r}")
        return tuple(_value(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    return _scalar(hint, value, path)


def _scalar(hint: type, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise InputError(f"{path} must be {_NAMES.get(hint, hint.__name__)}, not {value!r}")


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


_ABOVE_ZERO = (
    *("train.steps", "train.batch_size", "train.learning_rate", "train.grad_clip"),
    *("train.checkpoint_every", "train.log_every", "diffusion.density_std"),
    *("model.width", "model.depth", "model.heads", "model.patch", "align.block", "align.hidden"),
)
_NOT_NEGATIVE = (
    *("train.warmup_steps", "train.weight_decay", "train.keep_checkpoints", "train.threads"),
    *("train.cosine_weight", "train.align_weight", "stages.shared", "memory.jitter"),
)
_RATES = (
    *("train.ema_decay", "train.beta1", "train.beta2", "train.condition_dropout"),
    "memory.dropout",
)


def _check(config: RunConfig) -> None:
    """Refuses values that no run could use, and settings that would have no effect."""
    _bound(config, _ABOVE_ZERO, lambda v: v > 0, "must be above 0")
    _bound(config, _NOT_NEGATIVE, lambda v: v >= 0, "must not be negative")
    _bound(config, _RATES, lambda v: 0 <= v < 1, "must be at least 0 and below 1")
    model, diffusion, stages = config.model, config.diffusion, config.stages
    if model.width % model.heads:
        raise InputError(
            f"model.width {model.width} is not a multiple of model.heads {model.heads}"
        )
    if stages is not None:
        _check_stages(stages, model.depth)
    most = model.depth if stages is None else stages.shared
    if config.align is not None and config.align.block > most:
        raise InputError(f"align.block is {config.align.block}: it can be at most {most} here")
    if config.train.condition_dropout and config.memory is None and not model.labels:
        raise InputError("train.condition_dropout has no effect without memory and model.labels")
    if config.align is None and config.train.align_weight != TrainConfig.align_weight:
        raise InputError("train.align_weight has no effect without a section align")
    if (diffusion.parameterization == "edm") != (diffusion.schedule == "edm"):
        raise InputError(
            f"diffusion.parameterization {diffusion.parameterization} does not go with "
            f"diffusion.schedule {diffusion.schedule}: edm needs edm"
        )
    shape = (diffusion.density_mean, diffusion.density_std)
    if diffusion.density == "uniform" and shape != (0.0, 1.0):
        raise InputError("diffusion.density_mean and density_std have no effect on density uniform")


def _check_stages(stages: StagesConfig, depth: int) -> None:
    depths = stages.depths if stages.depths is not None else (depth - stages.shared,)
    if min(depths, default=0) < 1:
        raise InputError(f"stages.depths is {list(depths)}: each stage needs at least 1 block")
    if stages.shared + max(depths) != depth:
        raise InputError(
            f"model.depth is {depth}, but the deepest stage has {stages.shared} shared and "
            f"{max(depths)} own blocks: make model.depth {stages.shared + max(depths)}"
        )


def _bound(
    config: RunConfig, names: Sequence[str], holds: Callable[[float], bool], rule: str
) -> None:
    for name in names:
        section, key = name.split(".")
        owner = getattr(config, section)
        if owner is not None and not holds(getattr(owner, key)):
            raise InputError(f"{name} is {getattr(owner, key)}: it {rule}")
