"""Training: a state, a step, and a loop that owns nothing.

    batch(step) -> train_step(state, batch) -> hooks

`Batches` is a pure function of the step. The only things that change are in `TrainState`, which a
checkpoint holds completely. So "stop, then run the same command again" ends where an uninterrupted
run ends, bit for bit on a CPU.

    loss = mean denoise + cosine_weight mean cosine + align_weight mean align
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from stratagem.batches import Batch
from stratagem.checkpoint import Checkpoint
from stratagem.ema import Ema
from stratagem.errors import NonFinite, StratagemError
from stratagem.objective import Objective

__all__ = [
    "Hook",
    "Interrupted",
    "StopFlag",
    "TrainConfig",
    "TrainState",
    "fit",
    "learning_rate",
    "stop_on_signals",
    "train_step",
]


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and how often.

    Attributes:
        steps: Optimizer steps of the whole run.
        batch_size: Images per step.
        learning_rate: Peak learning rate of AdamW.
        schedule: "constant", or "cosine" down to zero over the run.
        warmup_steps: Steps of linear warm-up.
        beta1: First moment's decay.
        beta2: Second moment's decay.
        weight_decay: Decoupled weight decay.
        grad_clip: Largest norm of the gradient.
        ema_decay: Decay of the averaged weights.
        cosine_weight: Weight of the loss on the velocities' angle; 0 leaves it out.
        align_weight: Weight of the alignment, where the configuration has one.
        condition_dropout: Rate at which an image's conditions (snippet and class) are dropped
            whole, so that the network also learns to do without: guidance needs it.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: How many of them stay; 0 keeps all.
        log_every: Steps between lines of metrics.jsonl.
        threads: CPU threads; 0 measures which number is fastest here.
    """

    steps: int = 10_000
    batch_size: int = 128
    learning_rate: float = 2e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.9999
    cosine_weight: float = 0.0
    align_weight: float = 0.5
    condition_dropout: float = 0.0
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    log_every: int = 50
    threads: int = 0


class TrainState:
    """All that a training step changes.

    Args:
        objective: Losses of the denoiser in training.
        cfg: Optimizer and EMA settings.
    """

    def __init__(self, objective: Objective, cfg: TrainConfig) -> None:
        self.objective = objective
        self.ema = Ema(objective.denoiser.backbone, cfg.ema_decay)
        self.optimizer = torch.optim.AdamW(
            objective.parameters(),
            lr=cfg.learning_rate,
            betas=(cfg.beta1, cfg.beta2),
            weight_decay=cfg.weight_decay,
            fused=True,
        )
        self.step = 0
        self.sums: dict[str, float] = {}  # of the metrics since the last line of the log

    def checkpoint(self) -> Checkpoint:
        """Returns a copy-free view of everything, to be written at once."""
        moments = {
            f"moments.{name}.{key}": value
            for name, parameter in self.objective.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        head = self.objective.head.state_dict() if self.objective.head is not None else {}
        training = {**moments, **{f"head.{name}": value for name, value in head.items()}}
        model = self.objective.denoiser.backbone.state_dict()
        tensors = {"model": model, "ema": self.ema.state_dict(), "training": training}
        state = {"step": self.step, "sums": self.sums, "threads": torch.get_num_threads()}
        return Checkpoint(self.step, tensors, state)

    def restore(self, saved: Checkpoint) -> None:
        """Takes over a checkpoint of the same configuration."""
        self.objective.denoiser.backbone.load_state_dict(saved.tensors["model"])
        self.ema.load_state_dict(dict(saved.tensors["ema"]))
        parameters = dict(self.objective.named_parameters())
        for name, value in saved.tensors["training"].items():
            kind, rest = name.split(".", 1)
            if kind == "moments":
                parameter, key = rest.rsplit(".", 1)
                self.optimizer.state[parameters[parameter]][key] = value
            else:
                self.objective.get_parameter(name).data.copy_(value)
        self.step = saved.step
        self.sums = dict(saved.state["sums"])


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


def train_step(state: TrainState, batch: Batch, cfg: TrainConfig) -> dict[str, Tensor]:
    """Makes one optimizer step and returns the metrics of the batch, 0-dim tensors.

    Raises:
        NonFinite: If a loss or the gradient is; weights, moments and EMA have then not moved.
    """
    losses = state.objective(batch.x, batch.eps, batch.t, **batch.condition)
    metrics = {"loss": losses.denoise.mean()}
    total = metrics["loss"]
    if losses.cosine is not None:
        metrics["cosine"] = losses.cosine.mean()
        total = total + cfg.cosine_weight * metrics["cosine"]
    if losses.align is not None:
        metrics["align"] = losses.align.mean()
        total = total + cfg.align_weight * metrics["align"]
    total.backward()
    norm = nn.utils.clip_grad_norm_(state.objective.parameters(), cfg.grad_clip)
    if not torch.isfinite(total.detach() + norm):
        raise NonFinite(
            f"loss {float(total.detach()):.4g} or gradient {float(norm):.4g} is not finite at step "
            f"{state.step}, images {batch.ids[:8].tolist()}...: lower train.learning_rate"
        )
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, cfg)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)  # a decoder unused next time then stands still
    state.step += 1
    state.ema.update(state.step)
    return {**{name: value.detach() for name, value in metrics.items()}, "grad_norm": norm}


class Hook(NamedTuple):
    """Something to do every so many steps, and after the last one.

    Attributes:
        every: Steps between calls.
        call: Receives the state.
    """

    every: int
    call: Callable[[TrainState], None]


class Interrupted(StratagemError):
    """A signal ended the run after a checkpoint; the exit code is 128 + its number."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped at step {step}; the same command goes on from there")
        self.exit_code = 128 + number


@dataclass
class StopFlag:
    """Set by a signal, looked at between two steps."""

    number: int = 0


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Yields a flag that the first SIGINT, SIGTERM or SIGUSR1 sets; the second one acts at once."""
    flag = StopFlag()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        flag.number = number
        for n, handler in before.items():
            signal.signal(n, handler)

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fit(
    state: TrainState,
    batches: Callable[[int], Batch],
    cfg: TrainConfig,
    hooks: Sequence[Hook],
    *,
    save: Callable[[TrainState], None],
    stop: StopFlag,
) -> None:
    """Trains until `cfg.steps`; the only training loop.

    Args:
        state: Where training stands; changed in place.
        batches: The batch of each step.
        cfg: How to train.
        hooks: What to do in between.
        save: Writes a checkpoint: every `cfg.checkpoint_every` steps, at the end, on a stop.
        stop: Ends the loop after the current step.

    Raises:
        Interrupted: After a stop, with a checkpoint written.
        NonFinite: From `train_step`.
    """
    while state.step < cfg.steps:
        metrics = train_step(state, batches(state.step), cfg)
        for name, value in metrics.items():
            state.sums[name] = state.sums.get(name, 0.0) + float(value)
        last = state.step == cfg.steps
        for hook in hooks:
            if last or state.step % hook.every == 0:
                hook.call(state)
        if last or stop.number or state.step % cfg.checkpoint_every == 0:
            save(state)
        if stop.number and not last:
            raise Interrupted(stop.number, state.step)
