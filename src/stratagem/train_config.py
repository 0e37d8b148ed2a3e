"""How a run is trained: the section `train` of a configuration, and the learning rate it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from stratagem.data.order import Sampling
from stratagem.distributed import Parallel
from stratagem.optimizers import Algorithm

__all__ = ["Log", "TrainConfig", "in_bf16", "learning_rate"]

Log = Literal["tensorboard", "wandb"]

_MULTIPLIES_BF16 = (8, 0)  # compute capability, Ampere; older GPUs imitate it, slowly


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and how often.

    Attributes:
        steps: Optimizer steps of the whole run.
        batch_size: Images per step, over all processes and passes.
        sampling: "uniform": each image once an epoch; "class-balanced": each class equally often;
            "weighted": by `weights`.
        weights: Safetensors with "weights", one number per image of the data set.
        accumulate: Passes of a process per step, each with its part of the batch: less memory.
        optimizer: "adamw", or "muon" for the matrices inside the blocks.
        learning_rate: Peak learning rate.
        schedule: "constant", or "cosine" down to zero over the run.
        warmup_steps: Steps of linear warm-up.
        beta1: First moment's decay, and Muon's momentum.
        beta2: Second moment's decay.
        weight_decay: Decoupled weight decay.
        grad_clip: Largest norm of the gradient.
        ema_decay: Decay of the averaged weights, which are sampled.
        ema_stds: Power-function averages tracked beside them, by relative standard deviation, such
            as [0.05, 0.1], see `ema`; any other is then mixed of them, `--ema-std`.
        ema_snapshot_every: Steps between snapshots of these averages, which make the mixtures
            exact; 0 for none. Snapshots are never removed.
        cosine_weight: Weight of the loss on the velocities' angle; 0 leaves it out.
        align_weight: Weight of the alignment, where the configuration has one.
        condition_dropout: Rate at which an image's conditions (snippet and class) are dropped
            whole, so that the network also learns to do without: guidance needs it.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: How many of them stay; 0 keeps all.
        keep_every: Checkpoints of steps that it divides stay besides; 0 for none.
        log_every: Steps between lines of metrics.jsonl.
        log: Where these lines go besides: "tensorboard", "wandb".
        samples_every: Steps between pictures in samples/, at fixed noise and snippets; 0 for none.
        samples_autoencoder: Weights that make images of latents, for these pictures of a run of
            latents.
        threads: CPU threads; 0 measures which number is fastest here.
        device: "cpu", "cuda", or "auto": a GPU if there is one.
        precision: Of the network's products: "float32", "bf16", or "auto": bf16 on a GPU that
            multiplies it. Weights, moments, averages and losses are float32 always.
        compile: Whether the blocks are compiled.
        activation_checkpointing: Whether a block's inside is computed again in the backward pass,
            which saves its memory.
        parallel: With several processes: "ddp", each has the whole network, or "fsdp", a shard.
        sharded_checkpoints: Whether each process writes its own shard; "fsdp" only.
        nonfinite: What a loss or gradient that is not finite does: "stop" the run, or "skip" the
            update. Either way the weights do not move.
        nonfinite_limit: How many skipped steps in a row stop the run after all.
    """

    steps: int = 10_000
    batch_size: int = 128
    sampling: Sampling = "uniform"
    weights: str | None = None
    accumulate: int = 1
    optimizer: Algorithm = "adamw"
    learning_rate: float = 2e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.9999
    ema_stds: tuple[float, ...] = ()
    ema_snapshot_every: int = 0
    cosine_weight: float = 0.0
    align_weight: float = 0.5
    condition_dropout: float = 0.0
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    keep_every: int = 0
    log_every: int = 50
    log: tuple[Log, ...] = ()
    samples_every: int = 0
    samples_autoencoder: str | None = None
    threads: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bf16"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    parallel: Parallel = "ddp"
    sharded_checkpoints: bool = False
    nonfinite: Literal["stop", "skip"] = "stop"
    nonfinite_limit: int = 10


def in_bf16(cfg: TrainConfig, device: torch.device) -> bool:
    """Says whether the network's products are in bfloat16 on a device.

    Example:
        >>> in_bf16(TrainConfig(), torch.device("cpu"))
        False
    """
    if cfg.precision != "auto":
        return cfg.precision == "bf16"
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _MULTIPLIES_BF16


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Returns the learning rate of optimizer step `step`, counted from 0.

    Example:
        >>> cfg = TrainConfig(steps=100, learning_rate=1.0, warmup_steps=10, schedule="cosine")
        >>> [round(learning_rate(s, cfg), 3) for s in (0, 9, 10, 55, 100)]
        [0.1, 1.0, 1.0, 0.5, 0.0]
    """
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.learning_rate
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.learning_rate * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * done))))
