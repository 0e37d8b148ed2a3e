"""`stratagem doctor`."""

from __future__ import annotations

import dataclasses

from stratagem.cli.console import say, say_json
from stratagem.errors import InputError
from stratagem.programs.doctor import doctor as examine

__all__ = ["doctor"]


def doctor(json: bool = False) -> None:
    """Tells what is installed, what clashes, and the fix.

    Example: stratagem doctor

    Args:
        json: Print JSON.
    """
    findings = examine()
    if json:
        say_json([dataclasses.asdict(f) for f in findings])
    else:
        for finding in findings:
            say(f"{finding.level:<8} {finding.text}")
            if finding.fix:
                say(f"{'':<8} -> {finding.fix}")
    problems = sum(f.level == "problem" for f in findings)
    if problems:
        raise InputError(f"{problems} problem{'s' * (problems > 1)} found: see the fixes above")
