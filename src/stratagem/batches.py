"""The batches of a run, as a pure function of the step.

    step -> ids, flips -> x, eps, t, conditions

Order of the images, flips, noise, times and everything that is dropped come from counter-based
randomness, so nothing of it needs to be saved. One flip decision per image serves the image, its
snippet and its alignment target alike.

A snippet m is spoilt in training so that the network does not lean on it (GMem, arXiv 2412.08781):

    dropout   each number is zeroed with the given rate, the others are scaled by 1 / (1 - rate);
              "before" the projection (GMem v2), or "after" it, on the embedding (GMem v1)
    jitter    m + jitter z / sqrt(D), z standard normal
    drop      the whole snippet becomes zero, and the class label null; guidance needs this
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stratagem import randomness
from stratagem.data.images import to_float
from stratagem.data.shards import DataSet
from stratagem.density import TimeDensity, stratified
from stratagem.encoders import TokenEncoder
from stratagem.memory.bank import MemoryBank

__all__ = ["AlignTokens", "Batch", "Batches", "Conditions", "Snippets"]


class Batch(NamedTuple):
    """One training batch.

    Attributes:
        ids: Which images of the data set, (B,).
        x: Clean images in [-1, 1], (B, C, H, W).
        eps: Noise, like x.
        t: Times, (B,).
        condition: What the objective takes besides: memory (B, D), memory_keep (B, W), label (B,),
            align (B, L, D).
    """

    ids: Tensor
    x: Tensor
    eps: Tensor
    t: Tensor
    condition: dict[str, Tensor]


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
        """Returns tokens (B, L, D), float32, of images ids (B,), mirrored where flip (B,) is."""
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
            sides.append(torch.cat([self._encoder.tokens(b, self._grid).half() for b in images]))
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
    tokens: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Batches:
    """The batches of a run.

    Attributes:
        data: Where the images come from; held-out ones are never drawn.
        density: Where the times are drawn.
        batch_size: Images per step.
        seed: The run's seed.
        conditions: What the network is told of each image.
    """

    data: DataSet
    density: TimeDensity
    batch_size: int
    seed: int
    conditions: Conditions = Conditions()
    _orders: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def __call__(self, step: int) -> Batch:
        """Returns the batch of optimizer step `step`, counted from 0."""
        ids = self._ids(step)
        flip = self._flip(step)
        x = to_float(self.data.images(ids))
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        eps = randomness.normal(x.shape, self.seed, "noise", step)
        t = self.density.sample(stratified(len(ids), self.seed, "time", step)).float()
        return Batch(ids, x, eps, t, self._condition(ids, flip, step))

    def _ids(self, step: int) -> Tensor:
        """Position p of the run is image p mod N of epoch p // N, each epoch in its own order."""
        train = self.data.train_indices
        position = step * self.batch_size + torch.arange(self.batch_size)
        epochs = torch.div(position, len(train), rounding_mode="floor")
        parts = [
            train[self._order(epoch)[position[epochs == epoch] % len(train)]]
            for epoch in epochs.unique().tolist()
        ]
        return torch.cat(parts)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            self._orders.clear()
            num = len(self.data.train_indices)
            self._orders[epoch] = randomness.permutation(num, self.seed, "order", epoch)
        return self._orders[epoch]

    def _flip(self, step: int) -> Tensor:
        if not self.data.flip:
            return torch.zeros(self.batch_size, dtype=torch.bool)
        return self._uniform((self.batch_size,), "flip", step) < 0.5

    def _condition(self, ids: Tensor, flip: Tensor, step: int) -> dict[str, Tensor]:
        told, given = self.conditions, dict[str, Tensor]()
        dropped = torch.zeros(len(ids), dtype=torch.bool)
        if told.drop:
            dropped = self._uniform((len(ids),), "drop", step) < told.drop
        if told.snippets is not None:
            given = self._memory(told.snippets, ids, flip, step)
            given["memory"] = torch.where(dropped[:, None], 0, given["memory"])
        if told.num_classes:
            label = self.data.labels[ids]
            given["label"] = torch.where(dropped | (label < 0), told.num_classes, label)
        if told.tokens is not None:
            given["align"] = told.tokens(ids, flip)
        return given

    def _memory(
        self, snippets: Snippets, ids: Tensor, flip: Tensor, step: int
    ) -> dict[str, Tensor]:
        memory = snippets.bank.lookup(ids, flip)
        if snippets.jitter:
            z = randomness.normal(memory.shape, self.seed, "jitter", step)
            memory = memory + snippets.jitter * z / memory.shape[1] ** 0.5
        if not snippets.dropout:
            return {"memory": memory}
        if snippets.place == "before":
            return {"memory": memory * self._keep(memory.shape, snippets.dropout, step)}
        shape = (len(ids), snippets.width)
        return {"memory": memory, "memory_keep": self._keep(shape, snippets.dropout, step)}

    def _keep(self, shape: tuple[int, ...], rate: float, step: int) -> Tensor:
        """Factors of dropout: 0 with the given rate, else 1 / (1 - rate)."""
        return (self._uniform(shape, "snippet", step) >= rate) / (1 - rate)

    def _uniform(self, shape: tuple[int, ...], purpose: str, step: int) -> Tensor:
        return randomness.uniform(shape, self.seed, purpose, step)
