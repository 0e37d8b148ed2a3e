"""One encoder, one decoder per stage of the noise axis (arXiv 2312.09181, section 4).

    output = decoder_k(encoder(x_t, time, condition)),   k = stage of the row

The encoder is shared by all stages, which keeps what they have in common from being learnt K
times; each decoder is fitted to its stage, wide near the data and thin near the noise. A plain
network is the case K = 1.

A batch may mix stages: the shared part runs on all of it, the rows are sorted by stage, and each
decoder runs on its own contiguous slice. A decoder without rows is not run, so it gets no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MultiDecoder"]


class MultiDecoder(nn.Module):
    """A backbone of one encoder and K decoders.

    Args:
        encoder: Maps (x_t, time, memory=, label=) to features: a tuple, named or plain, of tensors
            whose first axis is the batch, or of such tuples.
        decoders: Decoder k maps features to an output like x_t; stage 0 is nearest the data.
    """

    def __init__(self, encoder: nn.Module, decoders: Sequence[nn.Module]) -> None:
        super().__init__()
        if not decoders:
            raise ValueError("a MultiDecoder needs at least one decoder")
        self.encoder = encoder
        self.decoders = nn.ModuleList(decoders)

    @property
    def num_stages(self) -> int:
        """Number of decoders K."""
        return len(self.decoders)

    def forward(
        self,
        x_t: Tensor,
        time: Tensor,
        *,
        stage: int | Tensor | None = None,
        **condition: Tensor | None,
    ) -> Tensor:
        """Maps noisy images to an output of their shape.

        Args:
            x_t: Noisy images, shape (B, C, H, W).
            time: Times, shape (B,).
            stage: Stage of all rows, or of each, shape (B,), int64. With one decoder there is
                nothing to choose and it may be left out.
            **condition: Handed to the encoder: memory (B, D), label (B,).

        Raises:
            ValueError: If there are several decoders and no stage, a stage out of range, or not
                one stage per row.
        """
        if isinstance(stage, Tensor) and stage.shape != x_t.shape[:1]:
            raise ValueError(f"{len(x_t)} images but stage of shape {tuple(stage.shape)}")
        return self.decode(self.encoder(x_t, time, **condition), stage)

    def decode(self, features: Any, stage: int | Tensor | None = None) -> Tensor:
        """Runs the decoders on features of the encoder; `stage` as in `forward`.

        Raises:
            ValueError: If there are several decoders and no stage, or a stage out of range.
        """
        if self.num_stages == 1:
            return self.decoders[0](features)
        if stage is None:
            raise ValueError(f"a network of {self.num_stages} decoders needs stage=")
        if isinstance(stage, int):
            if not 0 <= stage < self.num_stages:
                raise ValueError(f"stage must lie in 0..{self.num_stages - 1}: {stage}")
            return self.decoders[stage](features)
        return self._route(features, stage)

    def _route(self, features: Any, stage: Tensor) -> Tensor:
        """Sorts the rows by stage, runs each decoder on its slice, restores the order."""
        stages = torch.arange(self.num_stages, device=stage.device)
        counts = (stage == stages[:, None]).sum(1).tolist()  # the one wait for the device
        if sum(counts) != len(stage):
            raise ValueError(f"stages must lie in 0..{self.num_stages - 1}: {stage.unique()}")
        order = stage.argsort(stable=True)
        features = _rows(features, order)
        edges = [0, *accumulate(counts)]
        slices = [slice(start, end) for start, end in pairwise(edges)]
        outputs = [
            decoder(_rows(features, rows))
            for decoder, rows in zip(self.decoders, slices, strict=True)
            if rows.stop > rows.start
        ]
        return torch.cat(outputs)[order.argsort()]

    @torch.no_grad()
    def warm_start(self) -> None:
        """Copies decoder 0 into the others, tensor by tensor, wherever name and shape agree."""
        source = self.decoders[0].state_dict()
        for decoder in self.decoders[1:]:
            for name, target in decoder.state_dict().items():
                if name in source and source[name].shape == target.shape:
                    target.copy_(source[name])


def _rows(features: Any, rows: Tensor | slice) -> Any:
    """Selects rows of every tensor in a nest of plain or named tuples."""
    if isinstance(features, Tensor):
        return features[rows]
    make = getattr(type(features), "_make", tuple)
    return make(_rows(part, rows) for part in features)
