"""data/order.py: who is drawn how often, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stratagem import artifact
from stratagem.assemble import assemble
from stratagem.batches import Batches
from stratagem.config import ModelConfig, RunConfig, parse
from stratagem.data.order import Sampling, draw_weights, epoch_order
from stratagem.data.shards import DataSet
from stratagem.data.writing import Sample, Source, write_dataset
from stratagem.density import Uniform
from stratagem.errors import InputError
from stratagem.train import TrainConfig

COUNTS = (50, 7, 2, 1)  # images of each class


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    path = tmp_path_factory.mktemp("skewed") / "data"
    labels = [k for k, count in enumerate(COUNTS) for _ in range(count)]
    image = torch.zeros(1, 2, 2, dtype=torch.uint8)
    samples = [Sample(image, label, str(n)) for n, label in enumerate(labels[::-1])]
    return write_dataset(path, Source("t", [*"abcd"], samples), flip=False)


def times(order: Tensor, num: int = 60) -> Tensor:
    return order.bincount(minlength=num)


def test_uniform_draws_each_image_once(blobs: DataSet) -> None:
    assert draw_weights(blobs, "uniform") is None
    order = epoch_order(blobs, None, seed=3, epoch=2)
    assert torch.equal(order.sort().values, blobs.train_indices)
    assert torch.equal(order, epoch_order(blobs, None, seed=3, epoch=2))
    assert not torch.equal(order, epoch_order(blobs, None, seed=3, epoch=1))


@pytest.mark.parametrize("epoch", range(5))
def test_balanced_draws_see_each_class_equally_often(skewed: DataSet, epoch: int) -> None:
    weights = draw_weights(skewed, "class-balanced")
    order = epoch_order(skewed, weights, seed=0, epoch=epoch)
    assert len(order) == 60
    assert skewed.labels[order].bincount().tolist() == [15, 15, 15, 15]
    drawn = times(order)
    for label, count in enumerate(COUNTS):  # within a class, all equally often or once more
        assert set(drawn[skewed.labels == label].tolist()) <= {15 // count, -(-15 // count)}


def test_weights_are_met_in_every_epoch_and_in_the_mean(skewed: DataSet, tmp_path: Path) -> None:
    wanted = torch.rand(60, generator=torch.Generator().manual_seed(0))
    wanted[-5:] = 0
    wanted[0] = wanted[1:].sum() / 119  # alone in its class, and drawn in every second epoch
    artifact.write_tensor_file(tmp_path / "w.safetensors", {"weights": wanted})
    weights = draw_weights(skewed, "weighted", tmp_path / "w.safetensors")
    share = 60 * wanted.double() / wanted.double().sum()
    total = torch.zeros(60, dtype=torch.int64)
    for epoch in range(400):
        drawn = times(epoch_order(skewed, weights, 0, epoch))
        assert ((drawn - share).abs() < 1).all()
        total += drawn
    assert total[-5:].sum() == 0
    assert (total / 400 - share).abs().max() < 4 * 0.5 / 400**0.5


def test_the_draws_of_an_epoch_are_mixed(skewed: DataSet) -> None:
    order = epoch_order(skewed, draw_weights(skewed, "class-balanced"), 0, 0)
    labels = skewed.labels[order]
    assert 20 < (labels[1:] != labels[:-1]).sum() < 59


def test_batches_draw_by_weight_from_any_step(skewed: DataSet) -> None:
    weights = draw_weights(skewed, "class-balanced")
    batches = Batches(skewed, Uniform(), 25, seed=0, weights=weights)
    ids = torch.cat([batches(step).ids for step in range(12)])  # five epochs
    assert torch.equal(ids, torch.cat([epoch_order(skewed, weights, 0, e) for e in range(5)]))
    fresh = Batches(skewed, Uniform(), 25, seed=0, weights=weights)
    assert torch.equal(fresh(11).ids, ids[-25:])


def test_held_out_images_are_never_drawn(blobs: DataSet) -> None:
    weights = draw_weights(blobs, "class-balanced")
    for epoch in range(20):
        assert not blobs.held_out[epoch_order(blobs, weights, 0, epoch)].any()


def test_weights_that_do_not_fit_are_refused(blobs: DataSet, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    with pytest.raises(InputError, match="the file does not exist"):
        draw_weights(blobs, "weighted", file)
    wrong: list[tuple[Tensor, str]] = [
        (torch.ones(39), r"does not hold weights \(40,\)"),
        (torch.zeros(40), "not all of them 0"),
        (-torch.ones(40), "none below 0"),
        (torch.full((40,), torch.inf), "finite"),
    ]
    for weights, message in wrong:
        artifact.write_tensor_file(file, {"weights": weights})
        with pytest.raises(InputError, match=message):
            draw_weights(blobs, "weighted", file)


def test_unlabelled_images_cannot_be_balanced(tmp_path: Path) -> None:
    samples = [Sample(torch.zeros(1, 2, 2, dtype=torch.uint8), -1, "x")]
    data = write_dataset(tmp_path / "d", Source("t", [], samples), flip=False)
    with pytest.raises(InputError, match="need a label for each image"):
        draw_weights(data, "class-balanced")


@pytest.mark.parametrize("sampling", ["uniform", "class-balanced", "weighted"])
def test_a_run_draws_as_it_is_told(skewed: DataSet, tmp_path: Path, sampling: Sampling) -> None:
    artifact.write_tensor_file(tmp_path / "w", {"weights": torch.ones(60)})
    settings: dict[str, Any] = {"weights": str(tmp_path / "w")} if sampling == "weighted" else {}
    model = ModelConfig(width=16, depth=1, heads=2, patch=2)
    train = TrainConfig(batch_size=60, sampling=sampling, **settings)
    run = RunConfig(data=str(skewed.path), model=model, train=train)
    counts = skewed.labels[assemble(run).batches(0).ids].bincount().tolist()
    assert counts == ([15] * 4 if sampling == "class-balanced" else list(COUNTS))


@pytest.mark.parametrize("train", [{"weights": "w"}, {"sampling": "weighted"}])
def test_weights_and_weighted_need_each_other(train: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="need each other"):
        parse({"data": "d", "train": train})
