"""`stratagem keys`."""

from __future__ import annotations

import dataclasses
import json as json_module
import shutil
import textwrap

from tyro.conf import Positional

from stratagem.cli.console import say, say_json
from stratagem.config.keys import Key
from stratagem.config.keys import keys as find
from stratagem.errors import InputError

__all__ = ["keys"]


def keys(prefix: Positional[str] = "", /, json: bool = False) -> None:
    """Tells every key of a configuration, its default and its meaning.

    Example: stratagem keys
    Example: stratagem keys train.

    Args:
        prefix: Only the keys that begin with this: train. or stages.policy.
        json: Print JSON.
    """
    found = find(prefix)
    if not found:
        sections = ", ".join(key.name for key in find() if key.name.endswith("."))
        raise InputError(f"no key begins with {prefix}: sections are {sections}")
    if json:
        say_json([dataclasses.asdict(key) for key in found])
        return
    width = min(100, shutil.get_terminal_size().columns)
    for key in found:
        say(_heading(key))
        say(textwrap.fill(key.meaning, width, initial_indent="    ", subsequent_indent="    "))


def _heading(key: Key) -> str:
    if key.name.endswith("."):
        return f"\n{key.name[:-1]}:"
    default = "" if key.default is None else f" = {json_module.dumps(key.default)}"
    choices = f"  ({', '.join(key.choices)})" if key.choices else ""
    return f"{key.name}{default}{choices}"
