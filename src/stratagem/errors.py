"""The three ways in which a user's command can fail, each with its exit code.

Library code raises these (or a plain ValueError for a programming mistake); only `cli/` turns them
into one line on stderr and an exit code. The message says what is wrong, where, and how to mend it.
"""

from __future__ import annotations

__all__ = ["DamagedArtifact", "InputError", "MissingExtra", "NonFinite", "StratagemError"]


class StratagemError(Exception):
    """Base of every error that a user can meet; `exit_code` is what the program returns."""

    exit_code = 1


class InputError(StratagemError, ValueError):
    """The user's input is wrong: a path, a value, two artifacts that do not belong together."""

    exit_code = 2


class MissingExtra(InputError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed: run  pip install 'stratagem[{extra}]'  and try again"
        )


class DamagedArtifact(StratagemError):
    """A file of ours is truncated, altered or incomplete."""

    exit_code = 3


class NonFinite(StratagemError):
    """Training met NaN or infinity in the loss or in a gradient."""

    exit_code = 4
