"""Files of other projects: a state dict out of whatever they wrapped it in, and strict comparison.

    checkpoint.pt   {model, ema, opt, ...}  ->  ema, without "module." before its names

Foreign pickles are read by torch's tensor-only loader and by nothing else. What a file holds beside
the weights that were taken is named, so that nothing is left out silently.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stratagem.artifact import read_tensor_file
from stratagem.errors import DamagedArtifact, InputError

__all__ = ["Weights", "load_foreign", "read", "require_match"]

# What the weights may be wrapped in; of several in one file, the first of these is taken.
_WRAPPERS = ("ema", "network", "state_dict", "model")
_SHOWN = 3


class Weights(NamedTuple):
    """The weights in a file.

    Attributes:
        tensors: By official name.
        left_out: What else the file holds, such as "model" and "opt" beside the "ema" taken.
    """

    tensors: dict[str, Tensor]
    left_out: tuple[str, ...]


def read(path: Path) -> Weights:
    """Reads a state dict from a .safetensors, .pt or .pth file.

    Averaged weights ("ema") are preferred to the last ones. Tensors of a .pt file stay on the disk
    until they are used.

    Raises:
        InputError: If there is no such file, or no state dict in it, or a pickle with anything but
            tensors and plain values.
        DamagedArtifact: If it is truncated or altered.
    """
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: the file does not exist")
    if path.suffix == ".safetensors":
        body: Any = read_tensor_file(path)
    elif path.suffix in {".pt", ".pth"}:
        body = load_foreign(path)
    else:
        raise InputError(f"{path} is neither .safetensors nor .pt nor .pth: give such a file")
    left_out: list[str] = []
    while wrapper := _wrapper(body):
        left_out += [str(name) for name in body if name != wrapper]
        body = body[wrapper]
    if not isinstance(body, Mapping) or not body:
        raise InputError(f"{path} holds no state dict, but {_kind(body)}")
    odd = [str(name) for name, value in body.items() if not isinstance(value, Tensor)]
    if odd:
        raise InputError(f"{path} holds no plain state dict: {_some(odd)} are no tensors")
    tensors = {re.sub(r"^(module\.)+", "", name): t.detach() for name, t in body.items()}
    return Weights(tensors, tuple(left_out))


def load_foreign(path: Path) -> Any:
    """Reads a foreign pickle; beside tensors and plain values only command-line options pass."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is not loaded, since it is a pickle with more than tensors{_culprit(path)}: "
            "where you trust it, save its state dict alone"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DamagedArtifact(f"{path} is damaged ({reason}): fetch it again") from error


def _culprit(path: Path) -> str:
    with contextlib.suppress(Exception):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        return f" ({_some(names)})" if names else ""
    return ""


def _wrapper(body: Any) -> str | None:
    if not isinstance(body, Mapping):
        return None
    return next((w for w in _WRAPPERS if isinstance(body.get(w), Mapping) and body[w]), None)


def _kind(body: Any) -> str:
    return "an empty one" if isinstance(body, Mapping) else f"a {type(body).__name__}"


def require_match(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], what: str
) -> None:
    """Refuses a state dict whose names or shapes are not exactly the wanted ones.

    Args:
        tensors: By name.
        wanted: Shapes by name.
        what: The network they should be of.

    Raises:
        InputError: Naming a few of the missing, unexpected and mis-shaped tensors, and how many.
    """
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    misshaped = [
        f"{name} {tuple(t.shape)}, not {tuple(wanted[name])}"
        for name, t in tensors.items()
        if name in wanted and t.shape != wanted[name]
    ]
    lists = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped}
    faults = [f"{len(found)} {fault} ({_some(found)})" for fault, found in lists.items() if found]
    if faults:
        raise InputError(f"these are not the weights of {what}: {'; '.join(faults)}")


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_SHOWN])
    return f"{shown}, ..." if len(names) > _SHOWN else shown
