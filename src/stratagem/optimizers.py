"""Optimizers by name.

adamw   all parameters (arXiv 1711.05101), one fused kernel
muon    the matrices inside the blocks: momentum, made orthogonal by Newton-Schulz steps (Jordan
        et al. 2024, https://kellerjordan.github.io/posts/muon); the rest has AdamW. The update
        is scaled by 0.2 sqrt(max(rows, columns)) (arXiv 2502.16982), the root-mean-square of
        AdamW's, so both share one learning rate and one weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["Algorithm", "blocks_of", "make_optimizers"]

Algorithm = Literal["adamw", "muon"]


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Returns the repeated parts of a network: members of the innermost lists of modules.

    Example:
        >>> inner = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
        >>> blocks_of(nn.ModuleDict({"a": nn.ModuleList([inner]), "b": nn.Linear(2, 2)}))
        [Linear(in_features=1, out_features=1, bias=True), Linear(in_features=1, out_features=1, bias=True)]
    """  # noqa: E501
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    members = [member for part in lists for member in part]
    inside = (nn.ModuleList,)
    return [m for m in members if not any(isinstance(part, inside) for part in m.modules())]


def make_optimizers(
    module: nn.Module,
    algorithm: Algorithm,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> tuple[Optimizer, ...]:
    """Makes the optimizers of a module's parameters; none of them shares a parameter.

    Args:
        module: What is trained.
        algorithm: Its name.
        learning_rate: Of all of them.
        betas: Decays of AdamW's moments; Muon's momentum is the first.
        weight_decay: Of all of them, decoupled.
    """
    hidden = _matrices(blocks_of(module)) if algorithm == "muon" else []
    chosen = set(map(id, hidden))
    rest = [p for p in module.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(
        rest, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
    )
    if not hidden:
        return (adamw,)
    muon = torch.optim.Muon(
        hidden,
        lr=learning_rate,
        momentum=betas[0],
        weight_decay=weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return adamw, muon


def _matrices(blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [p for block in blocks for p in block.parameters() if p.ndim == 2]
