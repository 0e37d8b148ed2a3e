"""What is kept of a set's features: neither batches, order nor processes matter."""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import spawn

from stratagem.data.images import to_float
from stratagem.distributed import World, connect
from stratagem.errors import InputError, StratagemError
from stratagem.metrics import summary
from stratagem.metrics.frechet import moments
from stratagem.metrics.inception import Inception
from stratagem.metrics.inception_score import class_sums, inception_score
from stratagem.metrics.summary import Summary, Wanted, summarise
from stratagem.nets.inception import InceptionNet, Outputs
from stratagem.randomness import uniform

NUM = 23


class _Rows:
    """Two rows of an image are its features."""

    name, dim = "rows", 8

    def description(self) -> dict[str, Any]:
        return {"name": self.name}

    def __call__(self, images: Tensor) -> Tensor:
        return to_float(images)[:, 0, :2].flatten(1)


class _Everything(InceptionNet):
    """Stands for the Inception-v3, at no cost."""

    def forward(self, x: Tensor) -> Outputs:
        small = x[:, :, ::60, ::60].flatten(1)
        return Outputs(small, 2 * small[:, :9], small[:, :5].softmax(1))


def _images() -> Tensor:
    return (256 * uniform((NUM, 1, 4, 4), 0, "test")).to(torch.uint8)


def _everything() -> Inception:
    return Inception(_Everything(), "0" * 64, "tensorflow")


ALL = Wanted(rows=True, spatial=True, classes=True)


def _near(a: Summary, b: Summary) -> None:
    for name, tensor in a.tensors().items():
        torch.testing.assert_close(tensor, b.tensors()[name], rtol=1e-5, atol=1e-7)
    assert a.tensors().keys() == b.tensors().keys()
    if a.classes is not None:
        assert b.classes is not None
        torch.testing.assert_close(a.classes, b.classes, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [1, 5, NUM])
def test_batches_do_not_matter(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images, net = _images(), _everything()
    monkeypatch.setattr(summary, "class_sums", functools.partial(class_sums, split=10))
    found = summarise(images.split(size), net, ALL, num=NUM)
    outputs = net.outputs(images, classes=True)
    pooled = moments(outputs.pooled)
    assert outputs.spatial is not None
    assert outputs.classes is not None
    classes = class_sums(outputs.classes, 0, NUM, split=10)
    _near(found, Summary(pooled, moments(outputs.spatial), outputs.pooled, classes))
    assert inception_score(classes).value > 1


def test_only_what_is_wanted_is_kept() -> None:
    found = summarise(_images().split(4), _Rows())
    assert found.rows is found.spatial is found.classes is None
    assert found.pooled.num == NUM


def test_summaries_join_and_come_back_from_tensors() -> None:
    images, net = _images(), _everything()
    whole = summarise([images], net, ALL, num=NUM)
    parts = [
        summarise([images[:7]], net, ALL, num=NUM),
        summarise([images[7:]], net, ALL, first=7, num=NUM),
    ]
    _near(parts[0].join(parts[1]), whole)
    _near(Summary.from_tensors(whole.tensors()), Summary(whole.pooled, whole.spatial, whole.rows))
    plain = summarise([images], _Rows())
    _near(Summary.from_tensors(plain.tensors()), plain)


def test_no_images_are_refused() -> None:
    with pytest.raises(InputError, match="no images"):
        summarise([], _Rows())


def _process(rank: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def share(num: int) -> tuple[Any, int]:
        first, last = num * rank // 3, num * (rank + 1) // 3
        return _images()[first:last].split(4), first

    with connect("cpu") as world:
        batches, first = share(NUM)
        found = summarise(batches, _everything(), ALL, first=first, num=NUM, world=world)
        torch.save({**found.tensors(), "classes": found.classes}, out / str(rank))
        batches, _ = share(2)  # one process has none
        assert summarise(batches if rank else [], _Rows(), world=world).pooled.num == 2
        _fails(world)


def _fails(world: World) -> None:
    """One process meets a bad image: all of them end."""
    images = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)

    def batches() -> Any:
        yield images
        if world.rank == 1:
            raise InputError("bad.png is broken")

    with pytest.raises(StratagemError, match=r"bad\.png"):
        summarise(batches(), _Rows(), world=world)


@pytest.mark.slow
def test_processes_do_not_matter(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_process, (port, tmp_path), nprocs=3)
    whole = summarise([_images()], _everything(), ALL, num=NUM)
    for rank in range(3):
        found = torch.load(tmp_path / str(rank), weights_only=True)
        again = Summary.from_tensors(found)
        _near(Summary(again.pooled, again.spatial, again.rows, found["classes"]), whole)
