"""The batches of a run, as a pure function of the step.

    step -> ids, flips -> x, eps, t, conditions

Order of the images, flips, noise, times and everything that is dropped come from counter-based
randomness, so nothing of it needs to be saved. One flip decision per image serves the image, its
snippet and its alignment target alike. Rows draw their noise from streams of their own, so that a
process draws that of its rows alone; what is one number per row is drawn for all.

A snippet m is spoilt in training so that the network does not lean on it (GMem, arXiv 2412.08781):

    dropout   each number is zeroed with the given rate, the others are scaled by 1 / (1 - rate);
              "before" the projection (GMem v2), or "after" it, on the embedding (GMem v1)
    jitter    m + jitter z / sqrt(D), z standard normal
    drop      the whole snippet becomes zero, and the class label null; guidance needs this
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from stratagem import randomness
from stratagem.data.order import epoch_order
from stratagem.data.shards import DataSet
from stratagem.density import TimeDensity, stratified
from stratagem.encoders import TokenEncoder
from stratagem.memory.bank import MemoryBank
from stratagem.stage_draw import StageDraw

__all__ = ["AlignTokens", "Batch", "Batches", "Conditions", "Snippets", "Tokens"]

_AT_ONCE = 8  # batches in the hands of threads, at most, see `prefetch`


class Batch(NamedTuple):
    """One training batch, or a part of it: the rows of one process, or of one of its passes.

    Attributes:
        ids: Which images of the data set, (B,).
        x: Clean images in [-1, 1], (B, C, H, W).
        eps: Noise, like x.
        t: Times, (B,).
        condition: What the objective takes besides: memory (B, D), memory_keep (B, W), label (B,),
            align (B, L, D).
        weight: Weight of each image's losses, (B,); None for 1.
        counts: With stages, how many rows each has; the rows are sorted by stage.
        stage: What the network takes as stage: these counts, or the one decoder of a warm start.
        whole: With parts, how many rows the whole batch has of each stage; None: these are all.
    """

    ids: Tensor
    x: Tensor
    eps: Tensor
    t: Tensor
    condition: dict[str, Tensor]
    weight: Tensor | None = None
    counts: tuple[int, ...] | None = None
    stage: int | tuple[int, ...] | None = None
    whole: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Rows of the whole batch."""
        return len(self.ids) if self.whole is None else sum(self.whole)

    def part(self, index: int, parts: int) -> Batch:
        """Returns rows index, index + parts, ...: sorted as they are, each stage has its share."""
        rows, counts = slice(index, None, parts), _counts(self.counts, index, parts)
        return self._replace(
            ids=self.ids[rows],
            x=self.x[rows],
            eps=self.eps[rows],
            t=self.t[rows],
            condition={name: tensor[rows] for name, tensor in self.condition.items()},
            weight=None if self.weight is None else self.weight[rows],
            counts=counts,
            stage=counts if isinstance(self.stage, tuple) else self.stage,
            whole=self.whole or self.counts or (len(self.ids),),
        )


def _counts(counts: tuple[int, ...] | None, index: int, parts: int) -> tuple[int, ...] | None:
    """Returns how many of the rows index, index + parts, ... each stage has."""
    if counts is None:
        return None
    stages = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[index::parts]
    return tuple(stages.bincount(minlength=len(counts)).tolist())


class Tokens(Protocol):
    """Alignment targets."""

    @property
    def dim(self) -> int:
        """Length of a token."""
        ...

    def __call__(self, ids: Tensor, flip: Tensor) -> Tensor:
        """Returns tokens (B, L, dim), float32, of images ids (B,), mirrored where flip (B,) is."""


class AlignTokens:
    """Alignment targets: a frozen encoder's tokens of each image, mirrored where the image is.

    Args:
        data: The images.
        encoder: Its `tokens` makes the targets.
        grid: Places along one side, as the network has.
        cache: Whether the tokens of all images are made at once and kept, in float16.
    """

    def __init__(
        self, data: DataSet, encoder: TokenEncoder, grid: int, *, cache: bool = True
    ) -> None:
        self._data, self._encoder, self._grid = data, encoder, grid
        self.dim = encoder.token_dim
        self._kept = self._all() if cache else None

    def __call__(self, ids: Tensor, flip: Tensor) -> Tensor:
        """Returns tokens (B, L, D), float32, of images ids (B,), mirrored where flip (B,) is.

        Without a cache they are where the encoder is: on a GPU they need not come here and go back.
        """
        if self._kept is not None:
            return self._kept[flip.long(), ids].float()
        images = self._data.images(ids)
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        return self._encoder.tokens(images, self._grid)

    def _all(self) -> Tensor:
        """Tokens of all images, (1 or 2 sides, N, L, D), float16."""
        sides = []
        for mirrored in (False, True)[: 1 + self._data.flip]:
            images = (b.flip(-1) if mirrored else b for b in self._data.batches(256))
            tokens = (self._encoder.tokens(batch, self._grid) for batch in images)
            sides.append(torch.cat([part.half().cpu() for part in tokens]))
        return torch.stack(sides)


@dataclass(frozen=True)
class Snippets:
    """The bank and how its snippets are spoilt.

    Attributes:
        bank: Snippets of the data set.
        dropout: Rate at which numbers are zeroed.
        place: Where: "before" or "after" the projection.
        jitter: Size of the Gaussian noise, relative to that of the snippet's numbers.
        width: Width of the embedding, for "after".
    """

    bank: MemoryBank
    dropout: float = 0.0
    place: Literal["before", "after"] = "before"
    jitter: float = 0.0
    width: int = 0


@dataclass(frozen=True)
class Conditions:
    """What the network is told of an image.

    Attributes:
        snippets: Its snippet, or None.
        num_classes: Its class if above 0.
        drop: Rate at which an image's snippet and class are dropped whole.
        tokens: Maps ids (B,) and flips (B,) to alignment targets (B, L, D), or None.
    """

    snippets: Snippets | None = None
    num_classes: int = 0
    drop: float = 0.0
    tokens: Tokens | None = None


@dataclass(frozen=True)
class Batches:
    """The batches of a run.

    Attributes:
        data: Where the images come from; held-out ones are never drawn.
        density: Where the times are drawn.
        batch_size: Images per step.
        seed: The run's seed.
        conditions: What the network is told of each image.
        stages: Draws the times of each stage, in the density's place; None for one stage.
        weights: How often to draw each image, relative to the others, (N,); None: each once.
    """

    data: DataSet
    density: TimeDensity
    batch_size: int
    seed: int
    conditions: Conditions = Conditions()
    stages: StageDraw | None = None
    weights: Tensor | None = None
    _orders: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _ordering: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __call__(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """Returns the batch of optimizer step `step`, counted from 0, or one process's rows of it.

        Rows are the same whoever makes them; what only others need is neither read nor drawn.
        Threads may call this at the same time.

        Args:
            step: Optimizer step.
            rank: Which process; it has rows rank, rank + ranks, ...
            ranks: How many there are.
        """
        rows = slice(rank, None, ranks)
        ids = self._ids(step)[rows].contiguous()
        flip = self._flip(step)[rows]
        noise = functools.partial(self._normal, rows, self.data.shape, step=step)
        x = self.data.sample(ids, flip, lambda: noise(purpose="posterior"))
        eps = noise(purpose="noise")
        condition = self._condition(ids, flip, step, rows)
        whole = None if ranks == 1 else (self.batch_size,)
        if self.stages is None:
            t = self.density.sample(stratified(self.batch_size, self.seed, "time", step)).float()
            return Batch(ids, x, eps, t[rows], condition, whole=whole)
        t, counts, weight = self.stages.rows(self.batch_size, self.seed, step)
        stage, own = self.stages.route(counts, step), _counts(counts, rank, ranks)
        return Batch(
            *(ids, x, eps, t[rows].float(), condition, weight[rows].float(), own),
            own if isinstance(stage, tuple) else stage,
            None if ranks == 1 else counts,
        )

    def _ids(self, step: int) -> Tensor:
        """Position p of the run is image p mod N of epoch p // N, each epoch in its own order."""
        num = len(self.data.train_indices)
        position = step * self.batch_size + torch.arange(self.batch_size)
        epochs = torch.div(position, num, rounding_mode="floor")
        parts = [
            self._order(epoch)[position[epochs == epoch] % num]
            for epoch in epochs.unique().tolist()
        ]
        return torch.cat(parts)

    def _order(self, epoch: int) -> Tensor:
        """Order of an epoch; as many are kept as the batches span that threads make at a time."""
        with self._ordering:
            if epoch not in self._orders:
                self._orders[epoch] = epoch_order(self.data, self.weights, self.seed, epoch)
                kept = 2 + _AT_ONCE * self.batch_size // len(self.data.train_indices)
                for old in list(self._orders)[:-kept]:
                    del self._orders[old]
            return self._orders[epoch]

    def _flip(self, step: int) -> Tensor:
        if not self.data.flip:
            return torch.zeros(self.batch_size, dtype=torch.bool)
        return randomness.uniform((self.batch_size,), self.seed, "flip", step) < 0.5

    def _condition(
        self, ids: Tensor, flip: Tensor, step: int, rows: slice = slice(None)
    ) -> dict[str, Tensor]:
        told, given = self.conditions, dict[str, Tensor]()
        dropped = torch.zeros(len(ids), dtype=torch.bool)
        if told.drop:
            draws = randomness.uniform((self.batch_size,), self.seed, "drop", step)
            dropped = draws[rows] < told.drop
        if told.snippets is not None:
            given = self._memory(told.snippets, ids, flip, step, rows)
            given["memory"] = torch.where(dropped[:, None], 0, given["memory"])
        if told.num_classes:
            label = self.data.labels[ids]
            given["label"] = torch.where(dropped | (label < 0), told.num_classes, label)
        if told.tokens is not None:
            given["align"] = told.tokens(ids, flip)
        return given

    def _memory(
        self, snippets: Snippets, ids: Tensor, flip: Tensor, step: int, rows: slice
    ) -> dict[str, Tensor]:
        memory = snippets.bank.lookup(ids, flip)
        if snippets.jitter:
            z = self._normal(rows, memory.shape[1:], "jitter", step)
            memory = memory + snippets.jitter * z / memory.shape[1] ** 0.5
        if not snippets.dropout:
            return {"memory": memory}
        width = memory.shape[1] if snippets.place == "before" else snippets.width
        draws = randomness.uniform_at(self._numbers(rows), (width,), self.seed, "snippet", step)
        keep = (draws >= snippets.dropout) / (1 - snippets.dropout)
        if snippets.place == "before":
            return {"memory": memory * keep}
        return {"memory": memory, "memory_keep": keep}

    def _normal(self, rows: slice, shape: Sequence[int], purpose: str, step: int) -> Tensor:
        return randomness.normal_at(self._numbers(rows), shape, self.seed, purpose, step)

    def _numbers(self, rows: slice) -> range:
        return range(self.batch_size)[rows]
