"""What a network costs: parameters, and multiply-accumulates (MACs) of one call.

A MAC is one product and one addition, so MACs = FLOPs / 2. All matrix products and convolutions
count, the products of attention among them (scores and mixing, 2 L^2 W per image and block);
norms, activations and sums do not. Published counts often leave attention out, which understates
transformers: say which is meant.

The stages of a multi-decoder network differ in cost, so its cost is a mean under a named measure:
how often training draws a stage, or how often a sampler calls it. The two can differ by half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["macs", "mean_macs", "parameters", "saved_bytes"]


def parameters(module: nn.Module) -> int:
    """Returns the number of parameters of a module, shared ones counted once.

    Example:
        >>> parameters(nn.Linear(3, 5))
        20
    """
    return sum(p.numel() for p in module.parameters())


def macs(module: nn.Module, *inputs: Any, **keywords: Any) -> int:
    """Returns the MACs of one call of a module, attention included.

    Inputs and module may lie on the meta device, where nothing is computed.

    Args:
        module: The network.
        inputs: Its inputs; for the cost of one image, of batch size 1.
        keywords: Its keyword inputs, such as stage.

    Example:
        >>> macs(nn.Linear(3, 5), torch.zeros(2, 3))
        30
    """
    # The counter does not know the CPU's fused attention; the plain one is products it does know.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*inputs, **keywords)
    return int(counter.get_total_flops()) // 2


def saved_bytes(module: nn.Module, *inputs: Any, **keywords: Any) -> int:
    """Returns the bytes that one call of a module keeps for its gradient, beside its parameters.

    Args:
        module: The network.
        inputs: Its inputs.
        keywords: Its keyword inputs, such as stage.

    Example:
        >>> saved_bytes(nn.Sequential(nn.Linear(3, 5), nn.Sigmoid()), torch.zeros(2, 3))
        64
    """
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    saved: dict[int, int] = {}  # storages are compared, for views of one share their memory

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(note, lambda tensor: tensor):
        output = module(*inputs, **keywords)  # held while it is counted, and with it the storages
    del output
    return sum(saved.values())


def mean_macs(per_stage: Sequence[float], weights: Sequence[float]) -> float:
    """Returns the mean cost of a call when stage k is met with a share of weights[k].

    Args:
        per_stage: MACs of a call in each stage.
        weights: Shares or counts of the stages, not negative; they need not sum to 1.

    Raises:
        ValueError: If lengths differ, a weight is negative or all are 0.

    Example:
        >>> mean_macs([100, 10], [1, 3])
        32.5
    """
    if len(per_stage) != len(weights):
        raise ValueError(f"{len(per_stage)} costs but {len(weights)} weights")
    if min(weights, default=0) < 0 or sum(weights) <= 0:
        raise ValueError(f"weights must be non-negative with a positive sum: {list(weights)}")
    return sum(c * w for c, w in zip(per_stage, weights, strict=True)) / sum(weights)
