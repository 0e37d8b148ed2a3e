"""YAML to configuration and back, strictly.

Unknown keys, wrong types and impossible values end with one line that names the key, the value and
the nearest known key. YAML 1.1 reads `1e-4` as text; here it is a number where a number is wanted.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from stratagem.config.keys import keys
from stratagem.config.sections import RunConfig
from stratagem.errors import InputError

__all__ = ["dump", "load", "parse"]


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies `section.key=value` overrides, whose values are YAML too.

    Raises:
        InputError: If the file is missing, is no YAML mapping, or does not fit.
    """
    if not path.is_file():
        raise InputError(f"no configuration at {path}: the file does not exist")
    try:
        body = yaml.safe_load(path.read_text()) or {}
        if not isinstance(body, dict):
            raise InputError(f"{path}: expected `key: value` lines, found {type(body).__name__}")
        for override in overrides:
            _override(body, override)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not valid YAML: {reason}") from error
    return parse(body, str(path))


def parse(body: Mapping[str, Any], where: str = "configuration") -> RunConfig:
    """Makes a RunConfig of plain mappings, strictly.

    Raises:
        InputError: If a key is unknown, missing or of the wrong type, or a value impossible.

    Example:
        >>> parse({"data": "digits", "train": {"learning_rate": "1e-4"}}).train.learning_rate
        0.0001
        >>> parse({"data": "digits", "train": {"step": 5}}, "a.yaml")
        Traceback (most recent call last):
        ...
        stratagem.errors.InputError: a.yaml: unknown key train.step; did you mean train.steps?
    """
    try:
        return _dataclass(RunConfig, body, "")
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def dump(config: RunConfig) -> str:
    """Writes a configuration as YAML that `load` reads back to an equal one."""
    body = _plain(dataclasses.asdict(config))
    if config.unet is not None:
        del body["model"]
    return yaml.safe_dump(body, sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _override(body: dict[str, Any], text: str) -> None:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise InputError(f"--set {text!r}: expected section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        body = body.setdefault(section, {})
        if not isinstance(body, dict):
            raise InputError(f"--set {text!r}: {section} is not a section")
    try:
        body[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"--set {text!r}: the value is not valid YAML") from None


def _dataclass(cls: type[Any], body: Any, path: str) -> Any:
    if not isinstance(body, Mapping):
        raise InputError(
            f"{path.rstrip('.')} must be a section of `key: value` lines, not {body!r}"
        )
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in body:
        if key not in fields:
            raise InputError(f"unknown key {path}{key}{_nearest(str(key), list(fields), path)}")
    for name, field in fields.items():
        if name not in body and field.default is dataclasses.MISSING:
            raise InputError(f"{path}{name} is missing")
    return cls(**{key: _value(hints[key], value, f"{path}{key}") for key, value in body.items()})


def _nearest(key: str, known: Sequence[str], path: str) -> str:
    elsewhere = [k.name for k in keys() if k.name.endswith(f".{key}")]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {path}{match[0]}?" if match else f"; known are {', '.join(known)}"


def _value(hint: Any, value: Any, path: str) -> Any:
    """Converts one YAML value to the type of its field, or says why it cannot be."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        rest = next(a for a in arguments if a is not type(None))
        return None if value is None else _value(rest, value, path)
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast(type[Any], hint), value, path + ".")
    if origin is Literal:
        if value not in arguments:
            choices = ", ".join(map(str, arguments))
            raise InputError(f"{path} is {value!r}: choose one of {choices}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{path} must be a list, not {value!r}")
        return tuple(_value(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    return _scalar(hint, value, path)


def _scalar(hint: type, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise InputError(f"{path} must be {_NAMES.get(hint, hint.__name__)}, not {value!r}")


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
