"""Edits of a bank: each returns a new one, which knows what was done to which bank.

    add           rows that its encoder made of other images
    remove        rows, by number, name, label, or nearness to given vectors
    merge         two banks of one encoder
    interpolate   rows between pairs of its rows

New rows are written as the bank writes its own. Of a low-rank bank this is a projection, and a row
far from its directions is badly represented: `residuals` says how badly, for every row, before.

No edit copies the bank (`store`), and none keeps its tie to a data set: row i is then no longer
image i, so a bank that was edited serves sampling and not training. New rows count as held out,
for no network was trained on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stratagem.errors import InputError
from stratagem.memory.bank import MemoryBank
from stratagem.memory.ids import Ids
from stratagem.memory.interpolate import Way, blend
from stratagem.memory.store import Held, Joined, Recoded, Selected, Store, same, unit

__all__ = ["add", "interpolate", "merge", "remove", "residuals", "rows_of_ids", "rows_of_label"]

_FAINT = 1e-3  # length below which a stored row is rounding and has no direction


def add(
    bank: MemoryBank,
    rows: Tensor,
    ids: Sequence[str],
    *,
    labels: Tensor | None = None,
    entry: Mapping[str, Any] | None = None,
) -> MemoryBank:
    """Adds rows behind those of a bank.

    Args:
        bank: Any bank.
        rows: Vectors by the bank's encoder, of any length but 0, shape (n, F, D); or (n, D) for a
            bank without mirrored snippets.
        ids: Names of their images, n of them.
        labels: Their classes, shape (n,); by default -1.
        entry: What the history says of this edit beside the number of rows.

    Raises:
        InputError: If shapes do not fit, a row is unusable, or a low-rank bank cannot represent it.
    """
    rows = _shaped(bank, rows)
    labels = torch.full((len(rows),), -1) if labels is None else labels
    if len(ids) != len(rows) or labels.shape != (len(rows),):
        raise InputError(f"{len(rows)} rows with {len(ids)} names and {len(labels)} labels")
    flat = unit(rows.flatten(0, 1))
    columns = bank.store.codec.encode(flat)
    faint = bank.store.codec.decode(columns).norm(dim=1) < _FAINT
    if faint.any():
        row = int(faint.nonzero()[0]) // rows.shape[1]
        raise InputError(
            f"row {row} ({ids[row]}) is orthogonal to all that this low-rank bank can hold: leave "
            "it out, or add it to the bank before it is compressed"
        )
    new = Held(
        bank.store.codec, {name: c.unflatten(0, rows.shape[:2]) for name, c in columns.items()}
    )
    return dataclasses.replace(
        bank,
        store=Joined([bank.store, new]),
        labels=torch.cat([bank.labels, labels]),
        held_out=torch.cat([bank.held_out, torch.ones(len(rows), dtype=torch.bool)]),
        ids=bank.ids.join(Ids.of(ids)),
        frequency=_frequencies((bank.frequency, bank.num), (None, len(rows))),
        data="",
        history=_history(bank, {"edit": "add", "rows": len(rows), **(entry or {})}),
    )


def residuals(bank: MemoryBank, rows: Tensor) -> Tensor:
    """Tells how well new rows would be represented: the length of what is lost of a unit vector.

        |v - v'|,  0: nothing is lost; about 1 or more: nothing is kept

    Args:
        bank: The bank.
        rows: As for `add`.

    Returns:
        Shape (n, F), float32.
    """
    rows = _shaped(bank, rows)
    flat, codec = unit(rows.flatten(0, 1)), bank.store.codec
    return (flat - codec.decode(codec.encode(flat))).norm(dim=1).unflatten(0, rows.shape[:2])


def remove(bank: MemoryBank, rows: Tensor, *, entry: Mapping[str, Any] | None = None) -> MemoryBank:
    """Leaves rows out, shape (n,), int64; see `rows_of_ids`, `rows_of_label`, `search.rows_near`.

    Raises:
        InputError: If there are none, one is outside the bank, or none would be left.

    Example:
        >>> from stratagem.memory.store import hold
        >>> bank = MemoryBank(hold(torch.eye(3)[:, None]), torch.arange(3), torch.zeros(3), {}, "")
        >>> remove(bank, torch.tensor([1])).labels
        tensor([0, 2])
    """
    gone = torch.zeros(bank.num, dtype=torch.bool)
    gone[bank.checked(rows)] = True
    kept = (~gone).nonzero().flatten()
    if not len(rows) or not len(kept):
        raise InputError(f"{len(rows)} of {bank.num} rows are to be removed: remove some, not all")
    return dataclasses.replace(
        bank,
        store=Selected(bank.store, kept),
        labels=bank.labels[kept],
        held_out=bank.held_out[kept],
        ids=bank.ids.take(kept),
        frequency=bank.frequency[kept] if bank.frequency is not None else None,
        data="",
        history=_history(bank, {"edit": "remove", "rows": int(gone.sum()), **(entry or {})}),
    )


def rows_of_ids(bank: MemoryBank, ids: Collection[str]) -> Tensor:
    """Returns the rows of images with these names, increasing, int64.

    Raises:
        InputError: If the bank has no image of one of the names.
    """
    rows = bank.ids.find(ids)
    missing = set(ids) - {bank.ids[row] for row in rows.tolist()}
    if missing:
        raise InputError(f"the bank has no image named {min(missing)!r}: its names are like "
                         f"{bank.ids[0]!r}")  # fmt: skip
    return rows


def rows_of_label(bank: MemoryBank, label: int) -> Tensor:
    """Returns the rows of a class, increasing, int64.

    Raises:
        InputError: If there is none.
    """
    rows = (bank.labels == label).nonzero().flatten()
    if not len(rows):
        raise InputError(f"the bank has no image of label {label}: see `bank info`")
    return rows


def merge(first: MemoryBank, second: MemoryBank) -> MemoryBank:
    """Puts the rows of two banks into one, written as the first writes its own.

    Raises:
        InputError: If encoder, width or mirrored snippets differ.
    """
    if first.encoder != second.encoder:
        raise InputError(
            f"the banks were made by encoder {_name(first)} and by {_name(second)} or with other "
            "settings of it: merge banks of one encoder"
        )
    if (first.dim, first.flips) != (second.dim, second.flips):
        raise InputError(
            f"the banks have {first.dim} and {second.dim} numbers per snippet, mirrored ones "
            f"{first.flips} and {second.flips}: merge banks of one kind"
        )
    codec = first.store.codec
    alike = same(codec, second.store.codec)
    other: Store = second.store if alike else Recoded(second.store, codec)
    return dataclasses.replace(
        first,
        store=Joined([first.store, other]),
        labels=torch.cat([first.labels, second.labels]),
        held_out=torch.cat([first.held_out, second.held_out]),
        ids=first.ids.join(second.ids),
        frequency=_frequencies((first.frequency, first.num), (second.frequency, second.num)),
        shape=first.shape if first.shape == second.shape else None,
        data="",
        history=_history(first, {"edit": "merge", "rows": second.num, "with": second.fingerprint}),
    )


def interpolate(
    bank: MemoryBank,
    pairs: Tensor,
    weights: Sequence[float] | None = None,
    way: Way = "spherical",
    seed: int = 0,
    label: int | None = None,
) -> MemoryBank:
    """Adds rows between pairs of rows: all weights of the first pair, then of the second, ...

    Both sides of a bank with mirrored snippets are interpolated.

    Args:
        bank: Any bank.
        pairs: Rows a and b, shape (P, 2), int64.
        weights: Of b, for linear and spherical; None for masked and concatenated.
        way: How, see `memory.interpolate`.
        seed: Of the masked way.
        label: Class of the new rows; by default that of their pair if it has one, else -1.

    Raises:
        InputError: If a row is outside the bank, or the weights do not go with the way.
    """
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
        raise InputError(f"pairs of rows have shape {tuple(pairs.shape)}, not (P, 2)")
    if weights is not None and not (weights and all(0 <= w <= 1 for w in weights)):
        raise InputError(f"interpolation weights are {list(weights)}: give some between 0 and 1")
    times = len(weights) if weights is not None else 1
    first, second = bank.checked(pairs.flatten()).view(-1, 2).repeat_interleave(times, 0).T
    weight = torch.tensor(weights).repeat(len(pairs)) if weights is not None else None
    sides = []
    for side in range(bank.store.sides):
        flip = torch.full((len(first),), bool(side))
        ends = bank.lookup(first, flip), bank.lookup(second, flip)
        sides.append(blend(*ends, weight, way, seed))
    labels = torch.where(bank.labels[first] == bank.labels[second], bank.labels[first], -1)
    if label is not None:
        labels = torch.full_like(labels, label)
    names = [
        f"{bank.ids[a]}~{bank.ids[b]}" + ("" if weight is None else f"@{float(weight[row]):g}")
        for row, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True))
    ]
    entry: dict[str, Any] = {"edit": "interpolate", "way": way, "pairs": pairs.tolist()}
    entry |= {"weights": list(weights)} if weights is not None else {}
    entry |= {"seed": seed} if way == "masked" else {}
    return add(bank, torch.stack(sides, 1), names, labels=labels, entry=entry)


def _shaped(bank: MemoryBank, rows: Tensor) -> Tensor:
    """Returns rows as (n, F, D)."""
    sides = bank.store.sides
    wide = rows[:, None] if rows.ndim == 2 and sides == 1 else rows
    if wide.ndim != 3 or not len(wide) or wide.shape[1:] != (sides, bank.dim):
        raise InputError(
            f"rows have shape {tuple(rows.shape)}, the bank takes (n, {sides}, {bank.dim}): use "
            "its own encoder, with mirrored images if it has them"
        )
    return wide


def _history(bank: MemoryBank, entry: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    return (*bank.history, {**entry, "of": bank.fingerprint})


def _frequencies(*parts: tuple[Tensor | None, int]) -> Tensor | None:
    """Joins frequencies; rows without count as rows of the mean frequency of the others."""
    known = [frequency for frequency, _ in parts if frequency is not None]
    if not known:
        return None
    mean = float(torch.cat(known).double().mean())
    return torch.cat([torch.full((num,), mean) if f is None else f for f, num in parts])


def _name(bank: MemoryBank) -> str:
    return str(bank.encoder.get("name", "of no name"))
