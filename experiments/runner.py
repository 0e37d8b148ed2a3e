"""A table of runs: several configurations, several seeds, one evaluation protocol, one report.

    TABLE.yaml -> artifacts -> (configuration, seed) runs -> evaluations -> table and report

    artifacts   file or folder under OUT -> the stratagem command that makes it, without --out
    base        a configuration, as for `stratagem train`
    runs        name -> what differs from it; the first is the baseline of the others
    seeds       each run is trained with each of them
    features    feature nets of the Frechet distances
    sampling    settings of `stratagem sample`; the seed is the run's

$OUT stands for the folder. Every checkpoint is evaluated. Each run is a process of its own, so one
that fails ends no other. Stopped by a signal, the runs write checkpoints, and the same command goes
on; what is done is never done again, and a run that failed is tried again. Another protocol
evaluates anew and trains nothing.

    OUT/runs/NAME/seed-S     a run          OUT/runs/NAME/seed-S.log   what it said
    OUT/results.{md,json}    the table      OUT/report.html            the report

    python experiments/runner.py experiments/digits.yaml out/digits --jobs 2
    python experiments/runner.py experiments/digits.yaml out/digits --status
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from runner_report import write_report

from stratagem.artifact import write_bytes
from stratagem.assemble import make_schedule, open_run
from stratagem.checkpoint import list_steps
from stratagem.cli.console import progress_bar
from stratagem.config import RunConfig, dump, load, parse
from stratagem.encoders import EncoderName
from stratagem.errors import InputError, StratagemError
from stratagem.programs.evaluate import evaluate_run
from stratagem.programs.measures import FeatureName
from stratagem.programs.reference import Reference
from stratagem.programs.results import RunResult, read_run
from stratagem.programs.sample import SampleConfig, SamplerName, make_solver
from stratagem.programs.train import train
from stratagem.programs.train_log import read_log
from stratagem.stopping import StopFlag, stop_on_signals

__all__ = ["Pair", "Table", "main", "read_table"]

_SECTIONS = {
    **dict.fromkeys(("artifacts", "base", "runs", "sampling"), dict),
    **dict.fromkeys(("seeds", "features"), list),
}


@dataclass(frozen=True)
class Pair:
    """One run of the table: a configuration with a seed, where it lies, how it is measured."""

    name: str
    config: RunConfig
    path: Path
    features: tuple[FeatureName, ...]
    sampling: SampleConfig

    @property
    def id(self) -> str:
        """NAME/SEED."""
        return f"{self.name}/{self.config.seed}"

    def beside(self, suffix: str) -> Path:
        """A file next to the run's folder."""
        return self.path.with_name(self.path.name + suffix)

    def left(self) -> list[int]:
        """Returns the steps that are not evaluated by this protocol yet."""
        cfg = self.config.train
        steps = {*range(cfg.checkpoint_every, cfg.steps + 1, cfg.checkpoint_every), cfg.steps}
        return [step for step in sorted(steps) if not self._evaluated(step)]

    def _evaluated(self, step: int) -> bool:
        file = self.path / "evaluations" / f"step-{step:08d}" / "evaluation.json"
        if not file.is_file():
            return False
        protocol = json.loads(file.read_text())["protocol"]
        nets = [net["name"] for net in protocol["features"]]  # pixels32 is asked for as pixels
        alike = len(nets) == len(self.features) and all(map(str.startswith, nets, self.features))
        return alike and SampleConfig(**protocol["sampling"]) == self.sampling

    def done(self) -> bool:
        """Says whether this very configuration is trained and evaluated."""
        told = self.beside(".yaml")
        return told.is_file() and load(told) == self.config and not self.left()

    def state(self) -> str:
        """Says in a few words how far it is."""
        if self.done():
            return "done"
        said = self.beside(".log")
        lines = said.read_text().splitlines() if said.is_file() else []
        if lines and lines[-1].startswith("failed"):
            return f"{lines[-1]}: {lines[-2] if len(lines) > 1 else 'it said nothing'}"
        logged = [line["step"] for line in read_log(self.path / "metrics.jsonl")]
        step, steps = max([0, *logged, *list_steps(self.path)]), self.config.train.steps
        if step < steps:
            return f"step {step} of {steps}" if step else "waiting"
        return f"trained, {len(self.left())} evaluations left"

    def run(self, cache: Path) -> None:
        """Trains and evaluates what is left of it."""
        with progress_bar(f"{self.id} train", "steps") as progress:
            train(self.config, self.path, progress=progress)
        write_bytes(self.beside(".yaml"), dump(self.config).encode())
        if left := self.left():
            reference = Reference(Path(self.config.data), self.features, cache=cache)
            for step in left:
                evaluate_run(open_run(self.path, step=step), reference, self.sampling)
                print(f"evaluated at step {step}", flush=True)


@dataclass(frozen=True)
class Table:
    """What a table file says, for one folder."""

    file: Path
    out: Path
    artifacts: dict[str, str]
    pairs: list[Pair]


def read_table(file: Path, out: Path) -> Table:
    """Reads a table and checks every configuration of it.

    Raises:
        InputError: If it is not as the head of this file says, or a configuration is impossible.
    """
    try:
        body = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(body, dict) or {k: type(v) for k, v in body.items()} != _SECTIONS:
        kinds = ", ".join(f"{name} ({kind.__name__})" for name, kind in _SECTIONS.items())
        raise InputError(f"{file}: a table has exactly the sections {kinds}")
    known = {*get_args(EncoderName), *get_args(SamplerName)}
    for name in (*body["features"], *filter(None, [body["sampling"].get("sampler")])):
        if name not in known:
            raise InputError(f"{file}: {name} is neither a feature net nor a sampler")
    body = json.loads(json.dumps(body).replace("$OUT", json.dumps(str(out))[1:-1]))
    try:
        sampling = SampleConfig(**body["sampling"])
    except TypeError as error:
        raise InputError(f"{file}: sampling: {error}") from error
    pairs = []
    for (name, changes), seed in itertools.product(body["runs"].items(), body["seeds"]):
        merged = _merged(_merged(body["base"], changes or {}), {"seed": seed})
        config = parse(merged, f"{file}: {name}")
        cfg = dataclasses.replace(config.train, threads=config.train.threads or 1)
        if cfg.keep_checkpoints:
            raise InputError(f"{file}: train.keep_checkpoints must be 0, as all are evaluated")
        config = dataclasses.replace(config, train=cfg)
        path, own = out / "runs" / name / f"seed-{seed}", dataclasses.replace(sampling, seed=seed)
        make_solver(own, make_schedule(config.diffusion.schedule))  # said before the training
        pairs.append(Pair(name, config, path, tuple(body["features"]), own))
    if not pairs:
        raise InputError(f"{file}: there are no runs: give runs and seeds")
    pairs.sort(key=lambda pair: body["seeds"].index(pair.config.seed))  # each seed a whole table
    return Table(file, out, body["artifacts"], pairs)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            merged[key] = _merged(inner, value)
        else:
            merged[key] = value
    return merged


def make_artifacts(found: Table) -> None:
    """Makes the artifacts that are not there yet, in order.

    Raises:
        StratagemError: If a command fails; it has said why.
    """
    for name, command in found.artifacts.items():
        if not (found.out / name).exists():
            words = [*shlex.split(command), "--out", str(found.out / name)]
            code = subprocess.call([sys.executable, "-m", "stratagem", *words])
            if code:
                raise StratagemError(f"{name} was not made: stratagem {command}")


def work(found: Table, jobs: int) -> StopFlag:
    """Runs what is not done, so many at once, and returns whether a signal came."""
    waiting = [pair for pair in found.pairs if not pair.done()]
    running: dict[str, tuple[Pair, subprocess.Popen[bytes]]] = {}
    with stop_on_signals() as stop:
        try:
            while (waiting and not stop.number) or running:
                while waiting and len(running) < jobs and not stop.number:
                    pair = waiting.pop(0)
                    running[pair.id] = (pair, _start(found, pair))
                time.sleep(0.2)
                if stop.number:
                    for _, process in running.values():
                        process.terminate()
                    for pair, process in running.values():
                        process.wait()
                        print(f"{pair.id}: {pair.state()}", flush=True)
                    return stop
                for pair, process in list(running.values()):
                    if process.poll() is not None:
                        del running[pair.id]
                        _end(pair, process.returncode)
        finally:  # a second signal, or an error of ours
            for _, process in running.values():
                process.kill()
    return stop


def _start(found: Table, pair: Pair) -> subprocess.Popen[bytes]:
    """Starts a run as a process of its own, which signals of the terminal do not reach."""
    pair.path.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, __file__, str(found.file), str(found.out), "--run", pair.id]
    env = {**os.environ, "OMP_NUM_THREADS": str(pair.config.train.threads)}
    with pair.beside(".log").open("wb") as log:
        return subprocess.Popen(
            words, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )


def _end(pair: Pair, code: int) -> None:
    if code:
        with pair.beside(".log").open("a") as log:
            log.write(f"failed with exit code {code}\n")
    print(f"{pair.id}: {pair.state()}", flush=True)


def report(found: Table) -> None:
    """Writes table and report of the runs that are done.

    Raises:
        InputError: If none of the baseline is.
    """
    groups: dict[str, list[RunResult]] = {}
    states = {pair.id: pair.state() for pair in found.pairs}
    for pair in found.pairs:
        if states[pair.id] == "done":
            result = read_run(f"{pair.name} {pair.config.seed}", pair.path)
            groups.setdefault(pair.name, []).append(result)
    if (first := found.pairs[0].name) not in groups:
        raise InputError(f"no run of the baseline {first} is done: there is nothing to compare")
    left = {name: state for name, state in states.items() if state != "done"}
    print(write_report(found.file, found.out, groups, left))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a table, and returns the exit code: 0 if all of it is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path)
    parser.add_argument("out", type=Path, help="the folder of all that is made")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--status", action="store_true", help="say what is done and what is left")
    only.add_argument("--report", action="store_true", help="draw table and report anew")
    only.add_argument("--run", metavar="NAME/SEED", help="this one alone, in this process")
    options = parser.parse_args(arguments)
    try:
        return _main(read_table(options.table, options.out.absolute()), options)
    except KeyboardInterrupt:
        return 130
    except (StratagemError, OSError) as error:
        print(f"runner: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, StratagemError) else 2


def _main(found: Table, options: argparse.Namespace) -> int:
    if options.run:
        pair = next((pair for pair in found.pairs if pair.id == options.run), None)
        if pair is None:
            raise InputError(f"--run {options.run}: known are {[p.id for p in found.pairs]}")
        pair.run(found.out / "statistics")
        return 0
    if options.status:
        print("\n".join(f"{pair.id:<24} {pair.state()}" for pair in found.pairs))
        return 0
    if options.jobs < 1:
        raise InputError(f"--jobs is {options.jobs}: at least one run at once")
    if not options.report:
        make_artifacts(found)
        if number := work(found, options.jobs).number:
            return 128 + number
    report(found)
    left = [pair for pair in found.pairs if not pair.done()]
    for pair in left:
        print(f"{pair.id}: {pair.state()}", file=sys.stderr)
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
