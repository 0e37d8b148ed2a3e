"""`stratagem train`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, UseAppendAction

from stratagem.cli.console import progress_bar, say, say_json
from stratagem.config import load
from stratagem.distributed import rank
from stratagem.errors import InputError
from stratagem.programs import silent
from stratagem.programs.blank import Blank
from stratagem.programs.plan import plan, tailored
from stratagem.programs.train import train as train_run
from stratagem.stopping import Interrupted

__all__ = ["train"]


def train(
    config: Positional[Path],
    /,
    out: Path,
    set: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = (),  # noqa: A002
    dry_run: bool = False,
    shape: tuple[int, int, int] | None = None,
    json: bool = False,
) -> None:
    """Trains a run; the same command again goes on where it stopped.

    Example: stratagem train digits.yaml --out runs/digits --set train.steps=2000
    On 4 GPUs: torchrun --nproc-per-node 4 -m stratagem train digits.yaml --out runs/digits

    Args:
        config: The YAML file; `stratagem keys` lists its keys.
        out: The run's folder.
        set: Overrides of the file, section.key=value.
        dry_run: Print the resolved configuration, the choice of decoders, parameters, MACs, memory
            and disk, and stop; nothing is written.
        shape: With --dry-run, of data that are not there: channels, height and width of an image,
            or of a latent; snippets and targets then have 768 numbers, labels 1,000 classes.
        json: With --dry-run, print JSON.
    """
    resolved = load(config, set)
    if (json or shape is not None) and not dry_run:
        raise InputError("--json and --shape have no effect without --dry-run")
    if dry_run:
        found = plan(resolved, None if shape is None else Blank(shape))
        say_json(found.record()) if json else say("\n".join(found.lines()))
        return
    speaks = rank() == 0  # of several processes one
    tailoring = tailored(resolved)[1] if speaks else None
    if tailoring is not None:
        say("\n".join(tailoring.lines()))
    bar = progress_bar(f"train {out.name}", "steps") if speaks else nullcontext(silent)
    try:
        with bar as progress:
            state = train_run(resolved, out, progress=progress)
    except Interrupted as stop:
        if speaks:
            raise
        raise SystemExit(stop.exit_code) from None
    if speaks:
        say(f"{out}: trained to step {state.step:,}")
