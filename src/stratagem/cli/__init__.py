"""The program `stratagem`: one file per verb, each of which parses, calls `programs`, and prints.

    stratagem VERB [arguments]        stratagem VERB --help

Exit codes: 0 done; 2 the input is wrong, or the disk is full; 3 an artifact is damaged; 4 training
met NaN or infinity; 130, 138 and 143 stopped by SIGINT, SIGUSR1 or SIGTERM, after a checkpoint.
Errors are one line on stderr.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import inspect
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from stratagem import __version__

__all__ = ["main"]

# verb -> (module, function, what it does); modules are imported when their verb is called
VERBS = {
    "demo": ("demo", "demo", "both methods on real images, ends with a report"),
    "prepare": ("prepare", "prepare", "a folder of images -> a data set"),
    "bank build": ("bank", "build", "a data set -> a memory bank"),
    "bank import": ("bank", "import_", "an official bank -> a memory bank"),
    "bank info": ("bank", "info", "what a memory bank holds"),
    "bank compress": ("bank", "compress", "a bank in fewer bytes, and what that costs"),
    "bank add": ("bank", "add", "images or vectors into a bank"),
    "bank remove": ("bank", "remove", "rows out of a bank"),
    "bank merge": ("bank", "merge", "two banks into one"),
    "bank interpolate": ("bank", "interpolate", "rows between two rows"),
    "bank nearest": ("bank", "nearest", "the rows nearest to images"),
    "stages": ("stages", "stages", "a data set -> stages of the noise axis"),
    "train": ("train", "train", "a configuration -> a run; again: goes on"),
    "keys": ("keys", "keys", "every key of a configuration, its default and meaning"),
    "watch": ("watch", "watch", "runs in training -> a live chart"),
    "sample": ("sample", "sample", "a run -> images"),
    "evaluate": ("evaluate", "evaluate", "a run or samples -> quality and memorisation"),
    "compare": ("compare", "compare", "evaluated runs -> a report"),
    "audit": ("audit", "audit", "a run or samples -> are they copies? a report of closest pairs"),
    "import": ("import_", "import_", "an official checkpoint -> a run"),
    "bench train": ("bench", "train", "how fast a configuration trains here"),
    "bench sample": ("bench", "sample", "how fast a configuration samples here"),
    "doctor": ("doctor", "doctor", "what is installed, what clashes, and the fix"),
}

_OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory")
_LESS_MEMORY = (
    "out of memory: for training raise train.accumulate, set train.activation_checkpointing=true "
    "or train.precision=bf16, else give a smaller --batch-size"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in {"-h", "--help", "help"}:
        print(_usage())
        return 0
    if words[0] in {"-V", "--version"}:
        print(f"stratagem {__version__}")
        return 0
    verb = " ".join(words[:2]) if words[0] in {"bank", "bench"} else words[0]
    if verb not in VERBS:
        return _fail(_unknown(verb), 2)
    return _run(verb, words[len(verb.split()) :])


def _run(verb: str, words: list[str]) -> int:
    from stratagem.errors import StratagemError

    logging.basicConfig(format="stratagem: %(message)s", level=logging.WARNING)
    try:
        _parse(verb, words)()
    except StratagemError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("stopped; the same command goes on from what is finished", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "a file is there, and a folder is to be: choose another name"
        return _fail(f"{error.filename or 'a file'}: {reason}", 2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        return _fail(f"{_LESS_MEMORY} ({str(error)[:150] or 'MemoryError'})", 2)
    return 0


def _parse(verb: str, words: list[str]) -> Callable[[], None]:
    """Returns the verb with its arguments, ready to be called; help and bad options end here."""
    import tyro

    from stratagem.errors import InputError

    module, name, _ = VERBS[verb]
    function = getattr(importlib.import_module(f"stratagem.cli.{module}"), name)
    function.__doc__ = _help(function)

    @functools.wraps(function)
    def later(*args: Any, **keywords: Any) -> Callable[[], None]:
        return functools.partial(function, *args, **keywords)

    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(
                later,
                prog=f"stratagem {verb}",
                args=words,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        text = re.sub(r"[\u2500-\u257f]|-{3,}", " ", messages.getvalue())  # the frame around it
        reason = " ".join(text.partition("For full helptext")[0].split()).rstrip(".")
        reason = re.sub("^(Invalid choice|(Unrecognized|Required) options) (?=[iUM])", "", reason)
        again = "--set" in words and re.match(r"Unrecognized options: [\w.]+=", reason)
        hint = ": repeat --set for each" if again else ""
        raise InputError(f"{reason}{hint}; see  stratagem {verb} --help") from None


def _help(function: Callable[..., None]) -> str:
    """Returns a verb's docstring as tyro shows it well: examples apart, each flag in one line."""
    head, args, flags = (inspect.getdoc(function) or "").partition("\n\nArgs:\n")
    head = re.sub(r"\n+(?=[\w ]+: (stratagem|torchrun) )", "\n\n", head)
    return head + args + re.sub(r"\n {5,}", " ", flags)


def _usage() -> str:
    lines = [
        "usage: stratagem VERB [arguments]",
        "",
        "Train image diffusion and flow models in a fraction of the usual epochs.",
        "",
        *(f"  {verb:<17} {what}" for verb, (_, _, what) in VERBS.items()),
        "",
        "stratagem VERB --help tells more. Start with:  stratagem demo",
    ]
    return "\n".join(lines)


def _unknown(verb: str) -> str:
    known = [v for v in VERBS if v.startswith(verb.split(maxsplit=1)[0] + " ")] or list(VERBS)
    near = difflib.get_close_matches(verb, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return f"unknown verb {verb!r}; {hint}"


def _fail(message: str, code: int) -> int:
    print(f"stratagem: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
