"""`stratagem train --dry-run`: what a run will be and cost, before anything is trained or written.

    weights, gradients, moments, averages    exact: the tensors that training will hold
    activations ~ what network and heads keep of a batch for its gradient

All is built of tensors that have a shape and no content, so it takes no memory and little time.
Here too `stages.budget` is spent: decoders are chosen for the stages (see `tailor`), and what goes
on from here is a configuration that gives them as if by hand.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stratagem.assemble import Inputs, align_encoder, make_objective, open_inputs
from stratagem.config import RunConfig, dump
from stratagem.ema import Ema
from stratagem.errors import InputError
from stratagem.nets.cost import macs, saved_bytes
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.networks import make_backbone
from stratagem.objective import Objective
from stratagem.optimizers import blocks_of, make_optimizers
from stratagem.programs import device_of
from stratagem.programs.blank import Blank, sized_inputs
from stratagem.programs.cost import Cost, Visits, blank_images, network_cost, visits
from stratagem.programs.sample import SampleConfig
from stratagem.stage_draw import quotas
from stratagem.tailor import Setting, Tailoring, difficulty, tailor
from stratagem.train import prepare_blocks
from stratagem.train_config import TrainConfig, in_bf16

__all__ = ["Memory", "Plan", "plan", "tailored"]


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes.

    Attributes:
        weights: Of the network, and of heads that exist in training only.
        gradients: Of the same.
        moments: Of the optimizer.
        averages: Of the network's weights.
        activations: Estimate of what a batch keeps for its gradient.
        checkpoint: On disk, of each checkpoint.
    """

    weights: int
    gradients: int
    moments: int
    averages: int
    activations: int
    checkpoint: int


@dataclass(frozen=True)
class Plan:
    """What a run will be and cost.

    Attributes:
        config: Its configuration, with every decoder given.
        tailoring: How the decoders were chosen, or None.
        cost: Parameters and MACs.
        memory: Bytes while training.
    """

    config: RunConfig
    tailoring: Tailoring | None
    cost: Cost
    memory: Memory

    def record(self) -> dict[str, Any]:
        """Returns everything, JSON-able."""
        return {
            "config": dataclasses.asdict(self.config),
            "tailoring": None if self.tailoring is None else self.tailoring.record(),
            "cost": dataclasses.asdict(self.cost),
            "memory": dataclasses.asdict(self.memory),
        }

    def lines(self) -> list[str]:
        """Says everything in words."""
        cost, memory = self.cost, self.memory
        rows = zip(cost.stage_parameters, cost.stage_macs, cost.draws, cost.calls, strict=True)
        return [
            *dump(self.config).splitlines(),
            *([] if self.tailoring is None else ["", *self.tailoring.lines()]),
            "",
            "stage  parameters in use  MACs of a call   draws  calls of the default sampler",
            *(
                f"{k:<5}  {_count(used):>17}  {_count(macs):>14}  {draws:>6.1%}  {calls:>5}"
                for k, (used, macs, draws, calls) in enumerate(rows)
            ),
            f"parameters in all: {_count(cost.parameters)}",
            f"MACs of a call: {_count(cost.mean_macs_draws)} in the mean over draws, "
            f"{_count(cost.mean_macs)} over calls",
            f"memory: {_size(memory.weights)} weights, {_size(memory.gradients)} "
            f"gradients, {_size(memory.moments)} moments, {_size(memory.averages)} "
            f"averages; estimate of activations: {_size(memory.activations)}, if one process "
            "takes the whole batch; train.accumulate divides it",
            f"disk: {_size(memory.checkpoint)} for a checkpoint",
        ]


def plan(config: RunConfig, sizes: Blank | None = None) -> Plan:
    """Makes the plan of a run; reads of the data no more than what describes them.

    Args:
        config: The configuration.
        sizes: Of data, snippets and targets that are not there; None: they have to be.

    Raises:
        InputError: If the parts do not belong together, or the budget is too small.
        DamagedArtifact: If an artifact is truncated or altered.
    """
    inputs = open_inputs(config, verify=False) if sizes is None else sized_inputs(config, sizes)
    config, tailoring = _tailored(config, inputs)
    align = 0
    if config.align is not None:
        align = align_encoder(config.align).token_dim if sizes is None else sizes.token_dim
    made, met = inputs.description, _visits(config, inputs)
    with FakeTensorMode():
        objective = make_objective(config, made, inputs.stages, align)
        memory = _memory(objective, config, made, met)
        cost = network_cost(objective.denoiser.backbone, blank_images(made), met)
    return Plan(config, tailoring, cost, memory)


def tailored(config: RunConfig) -> tuple[RunConfig, Tailoring | None]:
    """Spends `stages.budget`: returns the configuration with its decoders given, and why so.

    Raises:
        InputError: If the stages have no similarity curves, or the budget is too small.
    """
    if config.stages is None or config.stages.budget is None:
        return config, None
    return _tailored(config, open_inputs(config, verify=False))


def _tailored(config: RunConfig, inputs: Inputs) -> tuple[RunConfig, Tailoring | None]:
    staged, stages = config.stages, inputs.stages
    if staged is None or stages is None or staged.budget is None:
        return config, None
    if "curves" not in inputs.record:
        raise InputError(
            f"stages.budget needs similarity curves, and {staged.file or 'stages.edges'} has none: "
            "find the stages with --method dp or optimal-denoiser, or choose the decoders by hand"
        )
    weights = _visits(config, inputs)._asdict()[staged.measure]
    if min(weights) <= 0:
        raise InputError(
            f"stages.budget cannot weigh stage {weights.index(min(weights))}: it gets no "
            f"{staged.measure}; choose another stages.measure or other stages"
        )
    shares = tuple(weight / sum(weights) for weight in weights)
    hard = difficulty(stages, inputs.record["curves"])
    made = {**inputs.description, "stages": []}  # of one stage, for decoders are made alike
    with torch.device("meta"):
        x_t, t, condition = blank_images(made)
        whole = make_backbone(dataclasses.replace(config, stages=None), made)
        unified = macs(whole, x_t, t, **condition)
        encoder = next(_networks(config, made))[1].encoder
        shared = macs(encoder, x_t, t, **condition) / unified
        features = encoder(x_t, t, **condition)
        ladder = (
            (size, macs(network.decoders[0], features) / unified)
            for size, network in _networks(config, made)
        )
        chosen = tailor(hard, shares, shared, ladder, staged.budget)
    sizes = tuple(size for size, _ in chosen)
    relative = tuple(shared + own for _, own in chosen)
    setting: Setting = "depths" if config.unet is None else "widths"
    why = Tailoring(setting, sizes, hard, staged.measure, shares, relative, staged.budget)
    return _sized(config, sizes), why


def _networks(config: RunConfig, made: dict[str, Any]) -> Iterator[tuple[int, MultiDecoder]]:
    """Yields networks of one decoder with its size, from the smallest up, without end."""
    grain = _grain(config)
    for size in itertools.count(grain, grain):
        one = _sized(config, (size,))
        assert one.stages is not None
        shared = dataclasses.replace(one.stages, form="tailored")  # whatever becomes of it
        try:
            yield size, make_backbone(dataclasses.replace(one, stages=shared), made)
        except InputError:  # heads and groups of a U-Net do not divide every width
            continue


def _grain(config: RunConfig) -> int:
    """One block of a transformer; 16 channels of a U-Net, or what divides its width."""
    if config.unet is None:
        return 1
    return min(math.gcd(config.unet.width, 16), max(1, config.unet.width // 4))


def _sized(config: RunConfig, sizes: tuple[int, ...]) -> RunConfig:
    """Gives the decoders as if by hand."""
    assert config.stages is not None
    staged = dataclasses.replace(config.stages, budget=None, measure="draws")
    if config.unet is not None:
        return dataclasses.replace(config, stages=dataclasses.replace(staged, widths=sizes))
    depth = (staged.shared or 0) + max(sizes)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, depth=depth),
        stages=dataclasses.replace(staged, depths=sizes),
    )


def _visits(config: RunConfig, inputs: Inputs) -> Visits:
    return visits(config, inputs.stages, SampleConfig())


def _memory(objective: Objective, config: RunConfig, made: dict[str, Any], met: Visits) -> Memory:
    """Makes the tensors of a training, without content, and adds up their sizes."""
    train = dataclasses.replace(config.train, compile=False)
    optimizers = make_optimizers(
        objective,
        train.optimizer,
        learning_rate=train.learning_rate,
        betas=(train.beta1, train.beta2),
        weight_decay=train.weight_decay,
    )
    for parameter in objective.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    moments = _nbytes(m for o in optimizers for kept in o.state.values() for m in kept.values())
    weights = _nbytes(objective.parameters())
    ema = Ema(objective.denoiser.backbone, train.ema_decay, train.ema_stds)
    averages = _nbytes(a for named in ema.groups.values() for a in named.values())
    prepare_blocks(blocks_of(objective), train)
    activations = _activations(objective, config, made, met)
    return Memory(weights, weights, moments, averages, activations, weights + moments + averages)


def _in_bf16(train: TrainConfig) -> bool:
    """Says whether products will be in bfloat16; a GPU that is not here is taken for a new one."""
    if train.device == "cuda" and not torch.cuda.is_available():
        return train.precision != "float32"
    return in_bf16(train, torch.device(device_of(train.device)))


def _activations(objective: Objective, config: RunConfig, made: dict[str, Any], met: Visits) -> int:
    """Estimates the bytes that a pass keeps: those of network and head, the losses' left out."""
    train, backbone = config.train, objective.denoiser.backbone
    rows = -(-train.batch_size // train.accumulate)
    x_t, t, condition = blank_images(made, rows)
    batches: list[int | tuple[int, ...]] = [0]
    if config.stages is not None and config.stages.form != "unified":
        single = config.stages.batch == "single"
        batches = (
            [*range(len(met.draws))] if single else [quotas(met.draws, max(rows, len(met.draws)))]
        )
    with torch.autocast("cpu", torch.bfloat16, enabled=_in_bf16(train)):
        kept = max(saved_bytes(backbone, x_t, t, stage=b, **condition) for b in batches)
        if objective.head is not None:
            tokens = (made["shape"][1] // config.model.patch) ** 2
            kept += saved_bytes(objective.head, torch.zeros(rows, tokens, config.model.width))
    return kept


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _count(number: float) -> str:
    return f"{number / 1e9:,.2f} G" if number >= 1e9 else f"{number / 1e6:,.2f} M"


def _size(number: float) -> str:
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"
