"""Foreign files: wrappers are taken off, code is not run, what does not fit is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem.errors import DamagedArtifact, InputError
from stratagem.interop.state_dict import Weights, read, require_match


def test_wrappers_are_taken_off(tmp_path: Path) -> None:
    tensor = torch.arange(3.0)
    state = {"module.module.a": tensor.requires_grad_()}
    cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        (state, ()),
        ({"model": {"a": torch.zeros(1)}, "ema": state, "opt": {}}, ("model", "opt")),
        ({"ema": {}, "state_dict": {"model": state, "epoch": 3}}, ("ema", "epoch")),
        ({"network": state, "memorybank": torch.zeros(2)}, ("memorybank",)),
    ]
    for number, (body, left_out) in enumerate(cases):
        path = tmp_path / f"{number}.pth"
        torch.save(body, path, _use_new_zipfile_serialization=number % 2 == 0)
        found = read(path)
        assert isinstance(found, Weights)
        assert list(found.tensors) == ["a"]
        assert torch.equal(found.tensors["a"], torch.arange(3.0))
        assert not found.tensors["a"].requires_grad
        assert found.left_out == left_out


class Trap:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickles_with_code_are_not_run(tmp_path: Path) -> None:
    for zipped in (True, False):
        body = {"model": {"a": torch.zeros(1)}, "args": Trap(tmp_path / "sprung")}
        torch.save(body, tmp_path / "trap.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match="pickle with more than tensors") as error:
            read(tmp_path / "trap.pt")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "sprung").exists()


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.zeros(1000)}, whole)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:-500])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("404 not found")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    for name in ("cut.pt", "empty.pt", "cut.safetensors"):
        with pytest.raises(DamagedArtifact, match="is damaged"):
            read(tmp_path / name)
    with pytest.raises((InputError, DamagedArtifact), match=r"text\.pt"):
        read(tmp_path / "text.pt")
    for name, body, message in [
        ("t.pt", torch.zeros(2), "holds no state dict, but a Tensor"),
        ("e.pt", {}, "an empty one"),
        ("n.pt", {"lr": 1.0, "a": torch.zeros(1)}, "lr are no tensors"),
    ]:
        torch.save(body, tmp_path / name)
        with pytest.raises(InputError, match=message):
            read(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "none.pt")
    (tmp_path / "w.ckpt").write_bytes(whole.read_bytes())
    with pytest.raises(InputError, match=r"neither \.safetensors nor \.pt"):
        read(tmp_path / "w.ckpt")


def test_matching_weights_pass() -> None:
    wanted = {"a": torch.Size([2]), "b": torch.Size([])}
    require_match({"a": torch.zeros(2), "b": torch.tensor(1.0)}, wanted, "a net")
    with pytest.raises(InputError, match=r"of a net: 1 mis-shaped \(b \(1,\), not \(\)\)"):
        require_match({"a": torch.zeros(2), "b": torch.zeros(1)}, wanted, "a net")
