"""The house: the order of imports, the size of its rooms, and who may do what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "src" / "stratagem"

# A module imports only from modules above it (DESIGN, section 2). A folder stands for its files.
ORDER = [
    "errors",
    "artifact",
    "randomness",
    "schedule",
    "stages",
    "density",
    "stage_draw",
    "memory",
    "clustering",
    "nets",
    "denoiser",
    "guidance",
    "grid",
    "sampler",
    "objective",
    "data",
    "encoders",
    "batches",
    "distributed",
    "prefetch",
    "optimizers",
    "train_config",
    "stopping",
    "ema",
    "checkpoint",
    "post_hoc",
    "train",
    "metrics",
    "interop",
    "autoencoders",
    "report",
    "tailor",
    "config",
    "networks",
    "assemble",
    "programs",
    "cli",
]
FILES = sorted(HOUSE.rglob("*.py"))
NAMES = [str(f.relative_to(HOUSE)) for f in FILES]
TREES = dict(zip(NAMES, (ast.parse(f.read_text()) for f in FILES), strict=True))


def room(name: str) -> str:
    return name.removesuffix(".py").split("/")[0]


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of everything of ours that a module imports, wherever in the file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def ours(tree: ast.AST) -> set[str]:
    rooms = {n.split(".")[1] for n in imports(tree) if n.startswith("stratagem.")}
    return rooms & set(ORDER)


@pytest.mark.parametrize("name", NAMES)
def test_imports_come_from_above(name: str) -> None:
    here = room(name)
    if here in {"__init__", "__main__"}:
        return
    assert here in ORDER, f"{here} has no place in the house: give it one in ORDER"
    below = {other for other in ours(TREES[name]) if ORDER.index(other) > ORDER.index(here)}
    assert not below, f"{name} imports {below}, which stand below it"


def test_the_order_check_sees_imports() -> None:
    """The check above would pass on anything if it saw no imports."""
    assert {"denoiser", "schedule"} <= ours(TREES["sampler/base.py"])
    assert {"clustering", "data"} <= ours(TREES["programs/stages.py"])


@pytest.mark.parametrize("name", NAMES)
def test_rooms_stay_small(name: str) -> None:
    path = HOUSE / name
    assert path.read_text().count("\n") <= 400, f"{name} is too long: cut it along a seam"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            length = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1)
            assert length <= 60, f"{name}: {node.name} has {length} lines"


def lines_of_code(tree: ast.AST) -> int:
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    docstrings = [
        node.body[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and ast.get_docstring(node) is not None
    ]
    text = {n for d in docstrings for n in range(d.lineno, d.end_lineno + 1)}
    lines = (getattr(n, "lineno", None) for n in ast.walk(tree))
    return len({n for n in lines if n is not None} - text)


def test_library_stays_within_its_budget() -> None:
    assert 2000 < sum(lines_of_code(tree) for tree in TREES.values()) <= 16000


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith("__main__.py")])
def test_only_the_command_line_prints_or_exits(name: str) -> None:
    if name.startswith("cli/"):
        return
    calls = {
        node.func.id
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"print", "exit", "quit"}
    assert "sys.exit" not in ast.unparse(TREES[name])


@pytest.mark.parametrize("name", NAMES)
def test_modules_say_what_they_are_and_export(name: str) -> None:
    tree = TREES[name]
    assert ast.get_docstring(tree), f"{name} has no docstring"
    exported = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    defined = {
        target
        for node in tree.body
        for target in (
            [node.name]
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            else [ast.unparse(t) for t in getattr(node, "targets", [])]
        )
    }
    public = {n for n in defined if not n.startswith("_") and not n.isupper()}
    if exported:
        assert set(exported[0]) <= defined | {
            a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names
        }
    else:
        assert not public, f"{name} has no __all__"


def test_exported_means_tested() -> None:
    """Every exported name occurs in a test."""
    here = Path(__file__)
    words = " ".join(f.read_text() for f in here.parent.glob("test_*.py") if f != here)
    missing = [
        f"{name}: {exported}"
        for name, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for exported in ast.literal_eval(node.value)
        if exported not in words
        and room(name) not in {"cli", "programs"}  # through the command line
    ]
    assert not missing


def test_torch_distributed_and_pickles_stay_out() -> None:
    for name, tree in TREES.items():
        text = ast.unparse(tree)
        called = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        assert not called & {"pickle.load", "pickle.loads"}, name
        assert "weights_only=False" not in text, name
        if room(name) != "distributed":
            assert "torch.distributed" not in text, name


def test_import_is_quiet() -> None:
    """Importing touches no torch RNG, no global setting, and prints nothing."""
    modules = [f"stratagem.{room(n)}" for n in NAMES if room(n) not in {"__main__", "__init__"}]
    code = (
        "import torch; s = torch.get_rng_state(); n = torch.get_num_threads();"
        f"import {', '.join(sorted(set(modules)))};"
        "assert torch.equal(s, torch.get_rng_state()); assert n == torch.get_num_threads();"
        "assert torch.get_default_dtype() is torch.float32; assert torch.is_grad_enabled()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b""
