"""`stratagem bench`: how fast a configuration trains and samples here, and where the time goes.

    FLOPs of a step = 3 * 2 * MACs of the losses     (the backward pass has two products for one)
    MFU             = FLOPs of a step / (seconds of a step * FLOP/s of a large matrix product)
    ratio           = seconds of the bare step / seconds of a step

A bare step is forward, backward and fused AdamW on a batch that is there already. Steps of the
loop and bare ones take turns on one network, a few at a time, so that whatever else the machine
does slows both; medians of the turns are compared. The loop is `fit`, with all that it does but
checkpoints. The FLOP/s are measured in between too, and those of the data sheet stand beside them.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stratagem.assemble import Inputs, Model, Parts, make_objective
from stratagem.autoencoders import finish_of
from stratagem.batches import Batch
from stratagem.config import RunConfig, StagesConfig
from stratagem.distributed import connect
from stratagem.errors import InputError
from stratagem.nets.cost import macs, parameters
from stratagem.prefetch import to_device
from stratagem.programs import Progress, silent
from stratagem.programs.blank import Blank, blank_parts, sized_inputs
from stratagem.programs.cost import blank_images, call_times, cost_of
from stratagem.programs.machine import device_name, peak_bytes, product_rate, sheet_rate, tf32, wait
from stratagem.programs.sample import SampleConfig, sample_run
from stratagem.stopping import StopFlag
from stratagem.train import Hook, TrainState, fit
from stratagem.train_config import TrainConfig, in_bf16

__all__ = ["SampleSpeed", "Speed", "bench_sample", "bench_train"]

ROUNDS = 7  # turns, where time allows
_BATCHES = 8  # of bare steps, for their stages differ by a row or two


@dataclass(frozen=True)
class Speed:
    """How fast a configuration trains.

    Attributes:
        device: Its name, and how many CPU threads.
        precision: Of the products.
        batch_size: Images per step.
        parameters: Of what is trained.
        macs: MACs of one image's losses, forward.
        images_per_second: Of the loop.
        bare_images_per_second: Of forward, backward and AdamW.
        ratio: The first over the second; the median over turns.
        peak: FLOP/s of a matrix product here.
        mfu: Share of that which the loop uses.
        sheet: FLOP/s of the data sheet; None if not known.
        sheet_mfu: Share of that.
        peak_bytes: Most memory of the device, or of this process on a CPU.
        milliseconds: Of a step of the loop: forward, backward, optimizer (AdamW), clip, ema, rest;
            and of what happens beside it, data: making a batch.
    """

    device: str
    precision: str
    batch_size: int
    parameters: int
    macs: float
    images_per_second: float
    bare_images_per_second: float
    ratio: float
    peak: float
    mfu: float
    sheet: float | None
    sheet_mfu: float | None
    peak_bytes: int
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class SampleSpeed:
    """How fast a configuration samples.

    Attributes:
        device: As in `Speed`; so is what is not named here.
        batch_size: Images at once.
        calls: Network calls for an image.
        images_per_second: Images, whole.
        network_share: Share of the time that the network's calls take alone.
        peak: FLOP/s of a float32 matrix product here.
        mfu: Share of that which sampling uses.
        peak_bytes: As in `Speed`.
    """

    device: str
    batch_size: int
    calls: int
    images_per_second: float
    network_share: float
    peak: float
    mfu: float
    peak_bytes: int


def bench_train(
    config: RunConfig,
    blank: Blank = Blank(),  # noqa: B008 (frozen)
    *,
    seconds: float = 20.0,
    progress: Progress = silent,
) -> Speed:
    """Measures how fast a configuration trains, on one device.

    Args:
        config: The configuration; its data and bank are used if they are there.
        blank: Sizes of what is not there.
        seconds: About how long to measure.
        progress: Called after each turn.

    Raises:
        InputError: If sizes are missing, parts do not belong together, or steps are not all alike.
    """
    cfg = config.train
    if config.stages is not None:
        if config.stages.batch == "single":
            raise InputError("bench train wants steps alike: give --set stages.batch=mixed")
        config = dataclasses.replace(
            config,
            stages=dataclasses.replace(config.stages, warm_steps=0, tie=StagesConfig.tie),
        )
    if cfg.accumulate != 1:
        raise InputError("bench train makes one pass a step: give --set train.accumulate=1")
    with connect(cfg.device) as world:
        if world.size > 1:
            raise InputError("bench train measures one process: start it without torchrun")
        torch.set_num_threads(cfg.threads or torch.get_num_threads())
        parts = blank_parts(config, blank)
        state = TrainState(parts.objective, cfg, parts.batches.stages, world=world)
        turns = _Turns(state, parts.batches, cfg, seconds, progress)
        turns.run()
        return turns.speed(_macs(config, parts))


class _Turns:
    """Steps of the loop and bare ones, by turns."""

    def __init__(
        self,
        state: TrainState,
        batches: Callable[[int], Batch],
        cfg: TrainConfig,
        seconds: float,
        progress: Progress,
    ) -> None:
        self._state, self._batches, self._cfg, self._progress = state, batches, cfg, progress
        self._device = state.world.device
        some = (to_device(batches(step), self._device) for step in range(_BATCHES))
        self._some = itertools.cycle(list(some))
        self._begun = 0.0  # of this turn
        self._adamw = torch.optim.AdamW(state.objective.parameters(), lr=0.0, fused=True)
        self._seconds = defaultdict[str, list[float]](list)
        self._bf16 = in_bf16(cfg, self._device)
        self._rates = [product_rate(self._device, self._precision)]
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._bare(2)
        step = self._timed("warm-up", self._bare, 2)
        # A turn has as many steps of the loop as bare ones, and parts of a step for half as long.
        affordable = seconds / 2.5 / step
        self._num = max(2, min(200, round(affordable / (ROUNDS + 1))))
        self._rounds = max(2, min(ROUNDS, round(affordable / self._num) - 1))

    @property
    def _precision(self) -> str:
        return "bf16" if self._bf16 else "float32"

    def run(self) -> None:
        """Lets the loop run, with bare steps and single parts of a step between its turns."""
        steps = self._num * (self._rounds + 1)
        cfg = dataclasses.replace(self._cfg, steps=steps, checkpoint_every=steps)
        hooks = [
            Hook(cfg.log_every, lambda state: state.sums.clear()),
            Hook(self._num, lambda state: self._turn(state.step // self._num - 1)),
        ]
        fit(self._state, self._batches, cfg, hooks, save=lambda _: None, stop=StopFlag())

    def _turn(self, done: int) -> None:
        """Ends a turn of the loop; the first one warms up."""
        wait(self._device)
        if done:
            self._seconds["loop"].append((time.perf_counter() - self._begun) / self._num)
        self._timed("bare", self._bare, self._num)
        few, ema, state = max(1, self._num // 4), self._state.ema, self._state
        self._timed("forward", self._forward, few)
        self._loss().backward()
        self._timed("optimizer", lambda n: [self._adamw.step() for _ in range(n)], few)
        self._timed("clip", self._clip, few)
        self._adamw.zero_grad(set_to_none=True)
        self._timed("ema", lambda n: [ema.update(state.step) for _ in range(n)], few)
        self._timed("data", lambda n: [self._batches(step) for step in range(n)], few)
        self._rates.append(product_rate(self._device, self._precision))
        self._progress(done, self._rounds)
        self._begun = time.perf_counter()

    def speed(self, each: float) -> Speed:
        """Returns the medians; `each` is the MACs of one image's losses."""
        median = {name: statistics.median(found) for name, found in self._seconds.items()}
        loop, bare, size = median["loop"], median["bare"], self._cfg.batch_size
        turns = zip(self._seconds["bare"][1:], self._seconds["loop"], strict=True)
        peak, rate = max(self._rates), 6 * each * size / loop
        sheet = sheet_rate(self._device) if self._bf16 else None
        parts = {name: median[name] for name in ("forward", "optimizer", "clip", "ema", "data")}
        parts["backward"] = bare - parts["forward"] - parts["optimizer"]
        parts["rest"] = loop - bare - parts["clip"] - parts["ema"]
        return Speed(
            device_name(self._device),
            self._precision,
            size,
            parameters(self._state.objective),
            each,
            size / loop,
            size / bare,
            statistics.median(bare / loop for bare, loop in turns),
            peak,
            rate / peak,
            sheet,
            None if sheet is None else rate / sheet,
            peak_bytes(self._device),
            {name: 1000 * value for name, value in parts.items()},
        )

    def _loss(self) -> Tensor:
        batch = next(self._some)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            call = self._state.wrapped.call
            losses = call(batch.x, batch.eps, batch.t, stage=batch.stage, **batch.condition)
        return torch.stack([part.mean() for part in losses if part is not None]).sum()

    def _forward(self, num: int) -> None:
        for _ in range(num):
            self._loss()

    def _bare(self, num: int) -> None:
        for _ in range(num):
            self._loss().backward()
            self._adamw.step()
            self._adamw.zero_grad(set_to_none=True)

    def _clip(self, num: int) -> None:
        for _ in range(num):
            nn.utils.clip_grad_norm_(self._state.objective.parameters(), self._cfg.grad_clip)

    def _timed(self, name: str, work: Callable[[int], Any], num: int) -> float:
        """Notes the seconds of one of `num` pieces of work."""
        wait(self._device)
        begun = time.perf_counter()
        work(num)
        wait(self._device)
        self._seconds[name].append(found := (time.perf_counter() - begun) / num)
        return found


def _macs(config: RunConfig, parts: Parts) -> float:
    """Counts the MACs of one image's losses, on tensors without content."""
    batch, tokens = parts.batches(0), parts.batches.conditions.tokens
    with torch.device("meta"):
        width = 0 if tokens is None else tokens.dim
        objective = make_objective(config, parts.description, parts.stages, width)
    batch = to_device(batch, torch.device("meta"))
    call = {"stage": batch.stage, **batch.condition}
    return macs(objective, batch.x, batch.eps, batch.t, **call) / len(batch.ids)


def bench_sample(
    config: RunConfig,
    how: SampleConfig,
    blank: Blank = Blank(),  # noqa: B008 (frozen)
    *,
    seconds: float = 20.0,
    progress: Progress = silent,
) -> SampleSpeed:
    """Measures how fast a network of a configuration, untrained, samples on one device.

    Args:
        config: The configuration; its data and bank are used if they are there.
        how: The sampler, its steps, and the images at once; the number of images is chosen here.
        blank: Sizes of what is not there.
        seconds: About how long to measure.
        progress: Called after each batch.

    Raises:
        InputError: As `bench_train`, or if a setting does not go with the configuration.
    """
    with connect(config.train.device) as world:
        torch.set_num_threads(config.train.threads or torch.get_num_threads())
        model = _untrained(config, sized_inputs(config, blank))
        calls = call_times(how, model.denoiser.schedule)
        flops = 2 * cost_of(model, how).mean_macs * len(calls)
        model.denoiser.to(world.device)
        size = how.batch_size
        begun = time.perf_counter()
        sample_run(model, dataclasses.replace(how, num=size))
        rounds = max(2, min(20, round(seconds / 2 / (time.perf_counter() - begun))))
        found = defaultdict[str, list[float]](list)
        rates = []
        for done in range(rounds):
            for name, work in {
                "all": lambda: sample_run(model, dataclasses.replace(how, num=size)),
                "network": lambda: _calls(model, calls, size),
            }.items():
                begun = time.perf_counter()
                work()
                wait(world.device)
                found[name].append(time.perf_counter() - begun)
            rates.append(tf32()(product_rate)(world.device, "float32"))
            progress(done + 1, rounds)
        whole, network = (statistics.median(found[name]) for name in ("all", "network"))
        return SampleSpeed(
            device_name(world.device),
            size,
            len(calls),
            size / whole,
            network / whole,
            max(rates),
            flops * size / whole / max(rates),
            peak_bytes(world.device),
        )


def _untrained(config: RunConfig, inputs: Inputs) -> Model:
    """Returns a network as it is initialised, ready to sample."""
    made, headless = inputs.description, dataclasses.replace(config, align=None)
    denoiser = make_objective(headless, made, inputs.stages).denoiser.eval().requires_grad_(False)
    return Model(denoiser, config, made, inputs.bank, 0, inputs.data.path, finish_of(made))


@tf32()
@torch.no_grad()
def _calls(model: Model, times: list[float], size: int) -> None:
    """Calls the network as a sampler does, and does nothing else."""
    weight = next(model.denoiser.parameters())
    x_t, _, condition = blank_images(model.made, size)
    condition = {name: value.to(weight.device) for name, value in condition.items()}
    x_t = x_t.to(weight)
    for t in times:
        model.denoiser(x_t, torch.tensor(t), **condition)
