"""Training: a state, a step, and a loop that owns nothing.

    batch(step) -> train_step(state, batch) -> hooks

`Batches` is a pure function of the step. The only things that change are in `TrainState`, which a
checkpoint holds completely. So "stop, then run the same command again" ends where an uninterrupted
run ends, bit for bit on a CPU.

    loss = mean denoise + cosine_weight mean cosine + align_weight mean align

Means are over the whole batch, w_i loss_i / B summed over passes and processes, so neither the
number of processes nor gradient accumulation changes a step by more than the rounding of its sums.
The loop does not wait for the device: it reads what the device says when a line is logged or a
checkpoint written, and whether a step was finite one step later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from stratagem import randomness
from stratagem.batches import Batch
from stratagem.checkpoint import Checkpoint
from stratagem.distributed import World, fill, full, like, wrap
from stratagem.ema import Ema
from stratagem.errors import DamagedArtifact, NonFinite
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.nets.warm_start import origins, tie_gradients, ties
from stratagem.objective import Losses, Objective
from stratagem.optimizers import blocks_of, make_optimizers
from stratagem.prefetch import Prefetch, threads_for, to_device
from stratagem.stage_draw import StageDraw, stage_sums
from stratagem.stopping import Finite, Interrupted, StopFlag
from stratagem.train_config import TrainConfig, in_bf16, learning_rate

__all__ = [
    "Hook",
    "TrainConfig",
    "TrainState",
    "fit",
    "learning_rate",
    "prepare_blocks",
    "train_step",
]


class TrainState:
    """All that a training step changes.

    Args:
        objective: Losses of the denoiser in training.
        cfg: Optimizer and EMA settings.
        stages: How batches draw their stages; it holds the history of their losses, if that
            matters, and says when a warm start ends.
        world: The processes that train together; the objective moves to this one's device.
        seed: The run's, for what the network draws itself.
    """

    def __init__(
        self,
        objective: Objective,
        cfg: TrainConfig,
        stages: StageDraw | None = None,
        *,
        world: World | None = None,
        seed: int = 0,
    ) -> None:
        self.objective = objective
        self.stages = stages
        self.world = world = world or World()
        self.seed = seed
        objective.to(world.device)
        backbone, blocks = objective.denoiser.backbone, blocks_of(objective)
        if isinstance(backbone, MultiDecoder):
            backbone.run_all = world.size > 1
        prepare_blocks(blocks, cfg)
        self.wrapped = wrap(objective, blocks, world, cfg.parallel)
        self.ema = Ema(backbone, cfg.ema_decay, cfg.ema_stds)
        self.optimizers = make_optimizers(
            objective,
            cfg.optimizer,
            learning_rate=cfg.learning_rate,
            betas=(cfg.beta1, cfg.beta2),
            weight_decay=cfg.weight_decay,
        )
        self._owners = {
            parameter: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        limit = cfg.nonfinite_limit if cfg.nonfinite == "skip" else 1
        self.finite = Finite(limit, world.device)
        self.tied: list[list[nn.Parameter]] = []  # decoders' weights that a warm start makes equal
        if stages is not None and stages.tie and isinstance(backbone, MultiDecoder):
            self.tied = ties(backbone, stages.warm_decoder)
        self.step = 0
        self.sums: dict[str, Tensor] = {}  # of the metrics since the last line of the log

    def moments(self, parameter: Tensor) -> dict[str, Any]:
        """Returns what the optimizer keeps of a parameter; empty before its first step."""
        return self._owners[parameter].state[parameter]

    @torch.no_grad()
    def require_finite(self) -> None:
        """Raises NonFinite if a weight or an average is not finite: that must not be saved."""
        groups: list[list[Tensor]] = [list(a.values()) for a in self.ema.groups.values()]
        for tensors in (*groups, list[Tensor](self.objective.parameters())):
            if not torch.isfinite(full(nn.utils.get_total_norm(tensors))):
                raise NonFinite(
                    f"weights or averages are not finite at step {self.step}: no checkpoint is "
                    "written, the one before is intact"
                )

    def checkpoint(self) -> Checkpoint:
        """Returns a copy-free view of everything, to be written at once."""
        moments = {
            f"moments.{name}.{key}": value
            for name, parameter in self.objective.named_parameters()
            for key, value in self.moments(parameter).items()
        }
        head = self.objective.head.state_dict() if self.objective.head is not None else {}
        training = {**moments, **{f"head.{name}": value for name, value in head.items()}}
        model = self.objective.denoiser.backbone.state_dict()
        tensors = {"model": model, **self.ema.state_dict(), "training": training}
        state = {
            "step": self.step,
            "sums": {name: float(value) for name, value in self.sums.items()},
            "nonfinite": int(self.finite.row),
            "threads": torch.get_num_threads(),
        }
        if self.stages is not None and self.stages.history is not None:
            training["history.sums"], state["history"] = self.stages.history.state()
        return Checkpoint(self.step, tensors, state)

    def restore(self, saved: Checkpoint) -> None:
        """Takes over a checkpoint of the same configuration."""
        _fill_all(self.objective.denoiser.backbone.state_dict(), saved.tensors["model"])
        self.ema.load_state_dict(saved.tensors)
        parameters = dict(self.objective.named_parameters())
        for name, value in saved.tensors["training"].items():
            kind, rest = name.split(".", 1)
            if kind == "moments":
                parameter, key = rest.rsplit(".", 1)
                target = parameters[parameter]
                self.moments(target)[key] = like(value, target.detach())
            elif kind == "history":
                assert self.stages is not None
                assert self.stages.history is not None
                self.stages.history.restore(value, saved.state["history"])
            else:
                fill(parameters[name], value)
        self.step = saved.step
        device, sums = self.world.device, saved.state["sums"].items()
        self.sums = {k: torch.tensor(v, dtype=torch.float64, device=device) for k, v in sums}
        self.finite.row.fill_(saved.state.get("nonfinite", 0))

    @torch.no_grad()
    def part_decoders(self, trained: int) -> None:
        """Ends a warm start: the trained decoder becomes all of them, see `nets.warm_start`."""
        backbone = self.objective.denoiser.backbone
        assert isinstance(backbone, MultiDecoder)
        weights: dict[str, Tensor] = dict(backbone.named_parameters())
        prefix = f"decoders.{trained}."
        groups = [weights, *self.ema.groups.values()]
        sources = [
            {name: full(tensor) for name, tensor in tensors.items() if name.startswith(prefix)}
            for tensors in groups
        ]
        for name, origin in origins(backbone, trained).items():
            for tensors, whole in zip(groups, sources, strict=True):
                fill(tensors[name], origin.make(whole))
            if origin.copied is not None:
                moments = self.moments(weights[origin.copied])
                copy = {key: value.clone() for key, value in moments.items()}
                self.moments(weights[name]).update(copy)


def train_step(state: TrainState, batch: Batch, cfg: TrainConfig) -> dict[str, Tensor]:
    """Makes one optimizer step and returns the metrics of the whole batch, 0-dim tensors.

    Args:
        state: Changed in place.
        batch: This process's rows, on its device.
        cfg: How to train.

    Raises:
        NonFinite: If a loss or the gradient is not finite, and such a step is not to be skipped
            or was one of too many; weights and moments have then not moved.
    """
    metrics, sums = _gradients(state, batch, cfg)
    norm = full(nn.utils.clip_grad_norm_(state.objective.parameters(), cfg.grad_clip))
    metrics = {**metrics, "grad_norm": norm}
    skip = state.finite.judge(state.step, batch.ids, metrics.pop("total"), norm)
    rate = learning_rate(state.step, cfg)
    if state.stages is not None and state.tied and state.step >= state.stages.warm_steps:
        tie_gradients(state.tied, state.stages.tie)
    for optimizer in state.optimizers:
        _update(optimizer, rate, skip, on_device=state.finite.lag > 0)
        optimizer.zero_grad(set_to_none=True)  # a decoder unused next time then stands still
    state.step += 1
    state.ema.update(state.step)
    if state.stages is not None and batch.counts is not None:
        if state.stages.history is not None:
            sums = torch.where(skip, 0, sums)
            state.stages.history.note(state.step - 1, sums, batch.whole or batch.counts)
        if state.step == state.stages.warm_steps:
            state.part_decoders(state.stages.warm_decoder)
    if cfg.nonfinite == "skip":
        metrics = {name: torch.where(skip, 0, value) for name, value in metrics.items()}
        metrics["skipped"] = skip
    return metrics


def _gradients(
    state: TrainState, batch: Batch, cfg: TrainConfig
) -> tuple[dict[str, Tensor], Tensor]:
    """Adds up the gradients of all passes; returns the metrics, and each stage's sum of losses."""
    world, passes = state.world, []
    for index in range(cfg.accumulate):
        part = batch if cfg.accumulate == 1 else batch.part(index, cfg.accumulate)
        holding = state.wrapped.holding if index + 1 < cfg.accumulate else nullcontext
        counters = (state.step, world.rank, index)
        draw = randomness.generator(state.seed, "network", *counters)
        _seed(int(draw.integers(2**63)), world.device)  # of dropout inside the network
        with holding():
            losses = _losses(state, part, cfg)
            metrics = _shares(losses, part, cfg)
            (metrics["total"] * world.size).backward()  # for processes average their gradients
        sums = stage_sums(losses.denoise, part.counts) if part.counts else torch.zeros(0)
        shares = torch.stack([value.detach() for value in metrics.values()])
        passes.append(torch.cat([shares, sums.to(shares)]))
    for parameter in _idle_parameters(state, batch):
        parameter.grad = None
    values = world.sum(torch.stack(passes).sum(0) if len(passes) > 1 else passes[0])
    return dict(zip(metrics, values, strict=False)), values[len(metrics) :]


def _seed(number: int, device: torch.device) -> None:
    """Seeds what networks draw with; torch.manual_seed asks all kinds of devices, each step."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def _losses(state: TrainState, part: Batch, cfg: TrainConfig) -> Losses:
    device = state.world.device
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(cfg, device)):
        return state.wrapped.call(part.x, part.eps, part.t, stage=part.stage, **part.condition)


def _shares(losses: Losses, part: Batch, cfg: TrainConfig) -> dict[str, Tensor]:
    """Returns what these rows add to the means over the whole batch, and to what is minimised."""

    def share(losses: Tensor) -> Tensor:
        return (losses if part.weight is None else losses * part.weight).sum() / part.size

    metrics = {"loss": share(losses.denoise)}
    total = metrics["loss"]
    if losses.cosine is not None:
        metrics["cosine"] = share(losses.cosine)
        total = total + cfg.cosine_weight * metrics["cosine"]
    if losses.align is not None:
        metrics["align"] = share(losses.align)
        total = total + cfg.align_weight * metrics["align"]
    return {**metrics, "total": total}


def _idle_parameters(state: TrainState, batch: Batch) -> list[nn.Parameter]:
    """Parameters of decoders that had no rows on any process, but ran to exchange gradients."""
    backbone, counts = state.objective.denoiser.backbone, batch.whole or batch.counts
    if not isinstance(backbone, MultiDecoder) or not backbone.run_all or counts is None:
        return []
    if isinstance(batch.stage, int):
        counts = tuple(int(k == batch.stage) for k in range(backbone.num_stages))
    decoders = zip(backbone.decoders, counts, strict=False)
    return [p for decoder, rows in decoders if not rows for p in decoder.parameters()]


def _update(optimizer: Optimizer, rate: float, skip: Tensor, *, on_device: bool) -> None:
    """Moves the weights, unless the step is to be skipped."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    if on_device and isinstance(optimizer, AdamW):
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]  # the kernel looks at it
        optimizer.step()
    elif not skip:  # waits for the device: with Muon, whose matrix products hide it
        optimizer.step()


def prepare_blocks(blocks: Sequence[nn.Module], cfg: TrainConfig) -> None:
    """Changes how blocks run, and none of their names."""
    if cfg.compile:
        # Of one function, which all blocks share, torch makes 8 graphs and runs the rest as it is:
        # too few for the widths and sides of a U-Net, or of decoders whose rows change.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit
    for block in blocks:
        if cfg.activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if cfg.compile:
            block.forward = torch.compile(block.forward)


def _fill_all(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    if targets.keys() != saved.keys():
        name = min(targets.keys() ^ saved.keys())
        raise DamagedArtifact(f"the checkpoint is of another network: they differ in {name}")
    for name, target in targets.items():
        fill(target, saved[name])


class Hook(NamedTuple):
    """Something to do every so many steps, and after the last one.

    Attributes:
        every: Steps between calls.
        call: Receives the state.
    """

    every: int
    call: Callable[[TrainState], None]


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
        batches: The batch of each step, or this process's rows of it.
        cfg: How to train.
        hooks: What to do in between.
        save: Writes a checkpoint: every `cfg.checkpoint_every` steps, at the end, on a stop.
        stop: Ends the loop after the current step, if it is set on any process.

    Raises:
        Interrupted: After a stop, with a checkpoint written.
        NonFinite: From `train_step`.
    """
    world, device = state.world, state.world.device
    early = Prefetch(batches, state.step, cfg.steps, threads=threads_for(world), device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), early as made:
        while state.step < cfg.steps:
            metrics = train_step(state, to_device(made.take(), device), cfg)
            for name, value in metrics.items():
                state.sums[name] = state.sums.get(name, 0) + value.double()
            last = state.step == cfg.steps
            for hook in hooks:
                if last or state.step % hook.every == 0:
                    hook.call(state)
            stopped = world.largest(stop.number)
            if last or stopped or state.step % cfg.checkpoint_every == 0:
                state.finite.settle()
                state.require_finite()
                save(state)
            if stopped and not last:
                raise Interrupted(stopped, state.step)
