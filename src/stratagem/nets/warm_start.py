"""Warm start: one trained decoder becomes all of them (arXiv 2211.01324: whole networks do).

    equal shape     every tensor is copied: the stage computes what the trained decoder computes
    fewer blocks    block j of d' is the trained block floor((j + 1/2) d / d')
    more blocks     trained block i of d goes to place floor((i + 1/2) d' / d); the modulations of
                    the others are 0, so their gates are shut and they begin as the identity
    other widths    channel j of n' is the trained channel floor(j n / n'), whole heads together

Columns of a map that read n channels are divided by how often each occurs, where channels are
repeated: the sum stays, and for a whole multiple every norm of a token does too, so the function is
preserved. Where channels are left out, columns grow by sqrt(n / n'), which keeps the size of a sum
of uncorrelated numbers. Group norms over joined inputs follow only roughly.

What is said of weights holds for their average; an optimizer's moments go with plain copies.

Parted at once, each decoder would learn from its own stage's rows alone, some 1/K of them. Tied,
the copies W_k of one tensor go on learning from all rows: with G_k the gradient of W_k,

    G_k  <-  (1 - tie) G_k + tie sum_j G_j

This is a preconditioner and no penalty: what the decoders have in common moves 1 + (K - 1) tie
times as fast, their differences 1 - tie times, and for tie < 1 the mixed gradients vanish only
where each decoder's own does. With tie 1 the copies stay equal, with 0 they part at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stratagem.nets.layers import Attention
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.nets.unet_blocks import UNetBlock

__all__ = ["Origin", "origins", "part_decoders", "tie_gradients", "ties"]


class Origin(NamedTuple):
    """Where a tensor of a decoder comes from at the warm start.

    Attributes:
        make: Makes it of the network's tensors by name: weights, or their averages.
        copied: The tensor it is a plain copy of, or None.
    """

    make: Callable[[Mapping[str, Tensor]], Tensor]
    copied: str | None = None


def origins(net: MultiDecoder, source: int) -> dict[str, Origin]:
    """Returns for each parameter of all decoders but `source` where it comes from, by name.

    Parameters that are not named keep what they are: maps of new blocks behind a shut gate.
    """
    trained = net.decoders[source]
    found: dict[str, Origin] = {}
    for k, decoder in enumerate(net.decoders):
        if k == source:
            continue
        for name, parameter in decoder.named_parameters():
            origin = _origin(trained, decoder, name, parameter, f"decoders.{source}.")
            if origin is not None:
                found[f"decoders.{k}.{name}"] = origin
    return found


@torch.no_grad()
def part_decoders(net: MultiDecoder) -> None:
    """Makes the largest decoder into all others, in place."""
    weights: dict[str, Tensor] = dict(net.named_parameters())
    for name, origin in origins(net, net.largest).items():
        weights[name].copy_(origin.make(weights))


def ties(net: MultiDecoder, source: int) -> list[list[nn.Parameter]]:
    """Returns the parameters that begin as copies of one tensor of `source`, that one first."""
    parameters = dict(net.named_parameters())
    found: dict[str, list[nn.Parameter]] = {}
    for name, origin in origins(net, source).items():
        if origin.copied is not None:
            tied = found.setdefault(origin.copied, [parameters[origin.copied]])
            tied.append(parameters[name])
    return list(found.values())


@torch.no_grad()
def tie_gradients(tied: Iterable[Sequence[nn.Parameter]], tie: float) -> None:
    """Mixes gradients among tied parameters, in place; one without a gradient has had no rows.

    Args:
        tied: Parameters of equal shape, as `ties` finds them.
        tie: Share of the others' gradients, in [0, 1].
    """
    for parameters in tied:
        grads = [p.grad for p in parameters if p.grad is not None]
        if not grads:
            continue
        common = sum(grads[1:], grads[0]) * tie
        for p in parameters:
            p.grad = common.clone() if p.grad is None else p.grad.mul_(1 - tie).add_(common)


def _origin(
    trained: nn.Module, decoder: nn.Module, name: str, new: Tensor, prefix: str
) -> Origin | None:
    twin, shape = _twin(trained, decoder, name), new.shape
    if twin is None:
        shut = name.rpartition(".")[0].endswith("modulation")
        return Origin(lambda _: torch.zeros(shape)) if shut else None
    olds = dict(trained.named_parameters())
    if twin not in olds:  # where the new decoder has a map, the trained one has the identity
        return Origin(lambda _: _identity(shape))
    full = prefix + twin
    if olds[twin].shape == shape:
        return Origin(lambda tensors: tensors[full], copied=full)
    rows, columns = _axes(trained, decoder, twin, name, olds[twin].shape, shape)
    return Origin(lambda tensors: _fold(tensors[full], rows, columns))


def _twin(trained: nn.Module, decoder: nn.Module, name: str) -> str | None:
    """Returns the name of the trained parameter for `name`, None in a block that is new."""
    owner, blocks, rest = name.partition("stack.blocks.")
    if not blocks:
        return name
    stacks = [d.get_submodule(owner + "stack.blocks") for d in (trained, decoder)]
    num, num_new = (len(list(stack.children())) for stack in stacks)
    block, _, rest = rest.partition(".")
    if num_new <= num:
        place = (2 * int(block) + 1) * num // (2 * num_new)
    else:
        places = [(2 * i + 1) * num_new // (2 * num) for i in range(num)]
        if int(block) not in places:
            return None
        place = places.index(int(block))
    return f"{owner}stack.blocks.{place}.{rest}"


class _Axis(NamedTuple):
    """Which entries of an old axis a new one takes, and the factor of each where it is read."""

    take: Tensor
    factor: Tensor


def _spread(old: int, new: int, unit: int = 1) -> _Axis:
    """Takes `new` of `old` entries, spread evenly, `unit` neighbours at a time.

    Spreading an axis spreads each of its equal parts: queries, keys and values keep apart.
    """
    units = torch.arange(new // unit) * (old // unit) // (new // unit)
    take = (units[:, None] * unit + torch.arange(unit)).flatten()
    times = torch.bincount(take, minlength=old)[take].double()
    return _Axis(take, 1 / times if new >= old else times * (old / new) ** 0.5)


def _identity(shape: torch.Size) -> Tensor:
    """The weight of a map or a 1x1 convolution to channels spread over its input; a bias is 0."""
    if len(shape) == 1:
        return torch.zeros(shape)
    return torch.eye(shape[1])[_spread(shape[1], shape[0]).take].view(shape)


def _fold(tensor: Tensor, rows: _Axis, columns: _Axis | None) -> Tensor:
    tensor = tensor[rows.take.to(tensor.device)]
    if columns is None:
        return tensor
    tensor = tensor[:, columns.take.to(tensor.device)]
    factor = columns.factor.to(tensor).view(1, -1, *[1] * (tensor.ndim - 2))
    return tensor * factor


def _axes(
    trained: nn.Module, decoder: nn.Module, twin: str, name: str, old: torch.Size, new: torch.Size
) -> tuple[_Axis, _Axis | None]:
    """The two axes of a map's weight, or the one of a bias or of a norm's weight."""
    owner, _, layer = name.rpartition(".")[0].rpartition(".")
    was = trained.get_submodule(twin.rpartition(".")[0].rpartition(".")[0])
    now = decoder.get_submodule(owner)
    unit_out = unit_in = 1
    if isinstance(now, Attention) and isinstance(was, Attention):
        head, head_new = was.out.in_features // was.heads, now.out.in_features // now.heads
        unit = head if head == head_new else 1
        unit_out, unit_in = (unit, 1) if layer == "qkv" else (1, unit)
    joined = 0
    if isinstance(now, UNetBlock) and isinstance(was, UNetBlock):
        joined = _joined(was, now)
    if layer == "norm_in":
        return _kept(old[0], new[0], joined), None
    rows = _spread(old[0], new[0], unit_out)
    if len(new) == 1:
        return rows, None
    if layer in ("conv_in", "skip"):
        return rows, _kept(old[1], new[1], joined)
    return rows, _spread(old[1], new[1], unit_in)


def _joined(was: UNetBlock, now: UNetBlock) -> int:
    """How many of a U-Net block's input channels are the encoder's, the last ones, which stay.

    The others are in proportion to the decoder's width: (old - s) / (new - s) = width / width'.
    """
    old, new = was.conv_in.in_channels, now.conv_in.in_channels
    width, width_new = was.conv_in.out_channels, now.conv_in.out_channels
    return (old * width_new - new * width) // (width_new - width)


def _kept(old: int, new: int, joined: int) -> _Axis:
    own = _spread(old - joined, new - joined)
    rest = torch.arange(old - joined, old)
    return _Axis(torch.cat((own.take, rest)), torch.cat((own.factor, torch.ones(joined))))
