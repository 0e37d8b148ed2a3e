"""Every key of a configuration: its choices, default and meaning, as the sections' docstrings say.

The sections are the one place where settings are described; this reads them.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any, Literal

from stratagem.config.sections import RunConfig

__all__ = ["Key", "keys"]


@dataclasses.dataclass(frozen=True)
class Key:
    """One setting, or a section of them.

    Attributes:
        name: As `--set` takes it, such as train.steps; a section's ends with a dot.
        default: Its value where the file says nothing; None: absent.
        choices: The words it may be; empty: anything of its kind.
        meaning: What it does.
    """

    name: str
    default: Any
    choices: tuple[str, ...]
    meaning: str


def keys(prefix: str = "") -> list[Key]:
    """Lists the keys whose names begin with `prefix`, in the order of the sections.

    Example:
        >>> [(key.name, key.default) for key in keys("train.ema")]
        [('train.ema_decay', 0.9999), ('train.ema_stds', ()), ('train.ema_snapshot_every', 0)]
    """
    return [key for key in _keys(RunConfig, "") if key.name.startswith(prefix)]


def _keys(section: type[Any], path: str) -> Iterator[Key]:
    told = (inspect.getdoc(section) or "").partition("Attributes:\n")[2]
    meanings = dict(re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", told, re.MULTILINE))
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        hint, name = hints[field.name], path + field.name
        kinds = (hint, *typing.get_args(hint))
        inner = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        meaning = " ".join(meanings[field.name].split())
        if inner is not None:
            yield Key(f"{name}.", None, (), meaning)
            yield from _keys(typing.cast(type[Any], inner), f"{name}.")
            continue
        words = [typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is Literal]
        default = None if field.default is dataclasses.MISSING else field.default
        yield Key(name, default, tuple(word for some in words for word in some), meaning)
