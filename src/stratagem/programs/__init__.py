"""What each verb of the command line does, as a function that neither prints nor exits.

One module per verb. The command line parses, calls one of these, and prints what it returns; the
demonstration calls the same functions in a row; so can any Python program.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[int, int], None]
"""Called now and then with how much is done and how much there is."""


def silent(done: int, total: int) -> None:
    """Shows no progress."""
