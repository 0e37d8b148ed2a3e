"""One encoder, one decoder per stage of the noise axis (arXiv 2312.09181, section 4).

    output = decoder_k(encoder(x_t, time, condition)),   k = stage of the row

The encoder is shared by all stages, which keeps what they have in common from being learnt K
times; each decoder is fitted to its stage, wide near the data and thin near the noise. A plain
network is the case K = 1; K networks that share nothing are K decoders behind an encoder that
passes its input on.

A batch may mix stages: the shared part runs on all of it, and each decoder on its own contiguous
slice of the rows. Training hands over rows sorted by stage with their counts, so that no device is
asked and shapes are fixed; a stage per row is sorted here. A decoder without rows is not run, so it
gets no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MultiDecoder", "PassOn", "Whole"]


class MultiDecoder(nn.Module):
    """A backbone of one encoder and K decoders.

    Args:
        encoder: Maps (x_t, time, memory=, label=) to features: a tuple, named or plain, of tensors
            whose first axis is the batch, or a nest of tuples and mappings of them.
        decoders: Decoder k maps features to an output like x_t; stage 0 is nearest the data.

    Attributes:
        run_all: Whether decoders without rows run too, on none of them: processes that train
            together exchange gradients of the same parts, whatever the rows of each.
    """

    def __init__(self, encoder: nn.Module, decoders: Sequence[nn.Module]) -> None:
        super().__init__()
        if not decoders:
            raise ValueError("a MultiDecoder needs at least one decoder")
        self.encoder = encoder
        self.decoders = nn.ModuleList(decoders)
        self.run_all = False

    @property
    def num_stages(self) -> int:
        """Number of decoders K."""
        return len(self.decoders)

    def forward(
        self,
        x_t: Tensor,
        time: Tensor,
        *,
        stage: int | Tensor | tuple[int, ...] | None = None,
        **condition: Tensor | None,
    ) -> Tensor:
        """Maps noisy images to an output of their shape.

        Args:
            x_t: Noisy images, shape (B, C, H, W).
            time: Times, shape (B,).
            stage: Stage of all rows; or of each, shape (B,), int64; or for rows sorted by stage
                the number of rows of each of the K stages. With one decoder there is nothing to
                choose and it may be left out.
            **condition: Handed to the encoder: memory (B, D), label (B,).

        Raises:
            ValueError: If there are several decoders and no stage, a stage out of range, or
                stages of other rows than these.
        """
        if isinstance(stage, Tensor) and stage.shape != x_t.shape[:1]:
            raise ValueError(f"{len(x_t)} images but stage of shape {tuple(stage.shape)}")
        rows = (self.num_stages, len(x_t))
        if isinstance(stage, tuple) and self.num_stages > 1 and (len(stage), sum(stage)) != rows:
            raise ValueError(f"{len(x_t)} images, {self.num_stages} stages, but {stage} rows")
        features = self.encoder(x_t, time, **condition)
        if self.num_stages == 1:
            return self.decoders[0](features)
        if stage is None:
            raise ValueError(f"a network of {self.num_stages} decoders needs stage=")
        if isinstance(stage, int):
            if not 0 <= stage < self.num_stages:
                raise ValueError(f"stage must lie in 0..{self.num_stages - 1}: {stage}")
            if not self.run_all:
                return self.decoders[stage](features)
            ends = [None if k == stage else 0 for k in range(self.num_stages)]
            return self._decode_slices(features, [slice(0, end) for end in ends])
        if isinstance(stage, tuple):
            return self._decode_sorted(features, stage)
        return self._route(features, stage)

    def _route(self, features: Any, stage: Tensor) -> Tensor:
        """Sorts the rows by stage, runs each decoder on its slice, restores the order."""
        stages = torch.arange(self.num_stages, device=stage.device)
        counts = (stage == stages[:, None]).sum(1).tolist()  # the one wait for the device
        if sum(counts) != len(stage):
            raise ValueError(f"stages must lie in 0..{self.num_stages - 1}: {stage.unique()}")
        order = stage.argsort(stable=True)
        return self._decode_sorted(_rows(features, order), counts)[order.argsort()]

    def _decode_sorted(self, features: Any, counts: Sequence[int]) -> Tensor:
        slices = [slice(start, end) for start, end in pairwise([0, *accumulate(counts)])]
        return self._decode_slices(features, slices)

    def _decode_slices(self, features: Any, slices: Sequence[slice]) -> Tensor:
        outputs = [
            decoder(_rows(features, rows))
            for decoder, rows in zip(self.decoders, slices, strict=True)
            if self.run_all or rows.stop != rows.start
        ]
        return torch.cat(outputs)

    @property
    def largest(self) -> int:
        """The decoder of most parameters, the first of equals: the one that a warm start trains."""
        sizes = [sum(p.numel() for p in d.parameters()) for d in self.decoders]
        return sizes.index(max(sizes))


class PassOn(nn.Module):
    """The encoder of networks that share nothing: its features are what it was given."""

    def forward(self, x_t: Tensor, time: Tensor, **condition: Tensor | None) -> dict[str, Tensor]:
        """Returns x_t (B, C, H, W), time (B,) and the conditions that are given, by name."""
        given = {name: value for name, value in condition.items() if value is not None}
        return {"x_t": x_t, "time": time, **given}


class Whole(nn.Module):
    """A decoder that is a whole network, behind `PassOn`.

    Args:
        network: A backbone of one decoder.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Maps the inputs of a network to its output."""
        return self.network(**inputs)


def _rows(features: Any, rows: Tensor | slice) -> Any:
    """Selects rows of every tensor in a nest of plain or named tuples, or of mappings."""
    if isinstance(features, Tensor):
        return features[rows]
    if isinstance(features, dict):
        return {name: _rows(part, rows) for name, part in features.items()}
    make = getattr(type(features), "_make", tuple)
    return make(_rows(part, rows) for part in features)
