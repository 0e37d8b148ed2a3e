"""Errors: the exit codes of the command line's contract."""

from __future__ import annotations

from stratagem.errors import (
    DamagedArtifact,
    InputError,
    MissingExtra,
    NonFinite,
    StratagemError,
)


def test_exit_codes_are_the_contract() -> None:
    codes = {InputError: 2, MissingExtra: 2, DamagedArtifact: 3, NonFinite: 4}
    for error, code in codes.items():
        assert issubclass(error, StratagemError)
        assert error.exit_code == code
    assert issubclass(InputError, ValueError)


def test_a_missing_extra_tells_the_command_that_mends_it() -> None:
    error = MissingExtra("scikit-learn", "demo")
    assert "pip install 'stratagem[demo]'" in str(error)
