"""`stratagem bank ...`: build, import, info, compress, add, remove, merge, interpolate, nearest."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from stratagem.cli.console import progress_bar, say, say_json
from stratagem.data.disk import amount
from stratagem.encoders import EncoderName, Pool
from stratagem.memory.bank import MemoryBank
from stratagem.memory.interpolate import Way
from stratagem.memory.store import LowRank
from stratagem.programs import Device
from stratagem.programs.bank import (
    Added,
    add_to_bank,
    build_bank,
    compress_bank,
    import_bank,
    interpolate_bank,
    merge_banks,
    nearest_in_bank,
    remove_from_bank,
)

__all__ = [
    "add",
    "build",
    "compress",
    "import_",
    "info",
    "interpolate",
    "merge",
    "nearest",
    "remove",
]


def build(
    data: Positional[Path],
    /,
    out: Path,
    encoder: EncoderName = "effnet",
    encoder_weights: str | None = None,
    encoder_size: int | None = None,
    pool: Pool | None = None,
    images: str | None = None,
    format: Literal["float32", "float16", "int8"] = "float16",  # noqa: A002
    batch_size: int = 256,
    device: Device = "auto",
) -> None:
    """Builds the memory bank of a data set; stopped, the same command goes on.

    Example: stratagem bank build out/photos --out out/photos-bank.safetensors
    Example: stratagem bank build out/photos --out bank --encoder dinov2-b --encoder-weights DIR

    Args:
        data: The data set.
        out: The bank's file.
        encoder: The frozen encoder: effnet (EfficientNet-Lite0, for photographs), pixels, or
            DINOv2 (-reg with registers) and DINOv3, small, base or large.
        encoder_weights: Of DINOv2 and DINOv3: the folder as transformers saves it, or the name of
            a repository of the Hugging Face hub, from where they are fetched.
        encoder_size: Side to which the encoder scales images: 64 for effnet, 224 for the others.
        pool: Of DINOv2 and DINOv3: the class token (the default), the mean of the patches, or both
            in a row.
        images: Of latents made straight from a folder, that folder.
        format: How vectors are stored; for low rank, compress the bank afterwards.
        batch_size: Images encoded at once.
        device: Where the encoder runs; auto takes a GPU where there is one.
    """
    with progress_bar("bank build", "images") as progress:
        bank = build_bank(
            data,
            out,
            encoder=encoder,
            weights=encoder_weights,
            size=encoder_size,
            pool=pool,
            images=images,
            form=format,
            batch_size=batch_size,
            device=device,
            progress=progress,
        )
    say(f"{out}: {_size(bank)}, encoder {encoder}")


def import_(
    file: Positional[Path],
    /,
    out: Path,
    format: Literal["float32", "float16", "int8"] | None = None,  # noqa: A002
) -> None:
    """Makes a bank of an official GMem file: a tensor of vectors, or a decomposed bank.

    Of a folder of its feature shards (latents_*.safetensors), the class tokens become a bank for
    training on these latents.

    Example: stratagem bank import memory_bank.pth --out bank.safetensors

    Args:
        file: The .pth or .pt file, or the folder.
        out: The bank's file.
        format: How vectors are stored; by default float16, and a decomposed bank stays low-rank.
    """
    with progress_bar("bank import", "rows") as progress:
        bank = import_bank(file, out, form=format, progress=progress)
    say(f"{out}: {_size(bank)}, encoder {bank.encoder['name']}")


def info(bank: Positional[Path], /, json: bool = False) -> None:
    """Tells what a memory bank holds.

    Example: stratagem bank info out/photos-bank.safetensors

    Args:
        bank: The bank's file.
        json: Print JSON.
    """
    facts = MemoryBank.load(bank).info()
    if json:
        say_json(facts)
        return
    history = facts.pop("history")
    for name, value in facts.items():
        say(f"{name:<12} {_fact(value)}")
    for entry in history:
        say(f"{'edit':<12} {entry}")


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_fact(inner)}" for key, inner in value.items())
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def compress(
    bank: Positional[Path],
    /,
    out: Path,
    format: Literal["float32", "float16", "int8", "low-rank"] = "int8",  # noqa: A002
    rank: int | None = None,
    cosine: float | None = None,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Writes a bank in fewer bytes and tells what is lost.

    Example: stratagem bank compress bank.safetensors --out small.safetensors --format low-rank
    --cosine 0.95

    Args:
        bank: The bank's file.
        out: The new bank's file.
        format: int8 (one byte per number), low-rank, float16 or float32.
        rank: Directions of low-rank.
        cosine: Instead of a rank: take the least at which 19 rows of 20 have this cosine to their
            original.
        seed: Of the choice of the 256 rows whose neighbours are compared.
        json: Print JSON.
    """
    with progress_bar("bank compress", "rows") as progress:
        small, kept = compress_bank(
            bank, out, form=format, rank=rank, cosine=cosine, seed=seed, progress=progress
        )
    if json:
        facts: dict[str, Any] = {"bytes": small.nbytes, "format": small.format, **kept._asdict()}
        say_json({**facts, "edit": small.history[-1]})
        return
    say(f"{out}: {_size(small)}, was {amount(MemoryBank.load(bank, verify=False).nbytes)}")
    say(f"energy kept  {kept.energy:.4f}")
    quantiles = ", ".join(f"{_share(q)} {value:.4f}" for q, value in kept.cosines.items())
    say(f"cosine       {quantiles}")
    if kept.recall is not None:
        say(f"recall@10    {kept.recall:.4f}")


def add(
    bank: Positional[Path],
    source: Positional[Path],
    /,
    out: Path,
    label: int = -1,
    encoder_weights: str | None = None,
    json: bool = False,
) -> None:
    """Adds images to a bank, or vectors that its encoder made; no network is trained.

    Example: stratagem bank add bank.safetensors photos/new --out larger.safetensors --label 10

    New rows count as held out: sample them with --snippets held-out, and --label if they have one.

    Args:
        bank: The bank's file.
        source: A folder of images, an image, or a .pth or .safetensors file with one tensor.
        out: The new bank's file.
        label: Class of the new rows; -1 for none.
        encoder_weights: Of a bank by DINOv2 or DINOv3, or imported from GMem: the encoder's weights
            for the images, a folder or a repository of the hub.
        json: Print JSON.
    """
    with progress_bar("bank add", "images") as progress:
        added = add_to_bank(
            bank, source, out, label=label, weights=encoder_weights, progress=progress
        )
    if json:
        lost = added.residuals.amax(1).tolist()
        facts = {"num": added.bank.num, "added": added.num, "residuals": lost}
        say_json({**facts, "rejected": added.rejected})
        return
    say(f"{out}: {_size(added.bank)}; {added.num} added{_lost(added)}")
    for name, cause in added.rejected:
        say(f"  left out: {name}: {cause}")


def remove(
    bank: Positional[Path],
    /,
    out: Path,
    ids: tuple[str, ...] = (),
    label: int | None = None,
    like: Path | None = None,
    cosine: float | None = None,
    encoder_weights: str | None = None,
) -> None:
    """Removes rows from a bank: by name, by label, or whatever is like given images.

    Example: stratagem bank remove bank.safetensors --like faces --cosine 0.8 --out less.safetensors

    Args:
        bank: The bank's file.
        out: The new bank's file.
        ids: Names of images.
        label: A class.
        like: An image or a folder of them.
        cosine: With --like: rows that have at least this cosine to one of the images go.
        encoder_weights: Of a bank by DINOv2 or DINOv3, or imported from GMem: the encoder's weights
            for the images, a folder or a repository of the hub.
    """
    with progress_bar("bank remove", "images") as progress:
        left, num = remove_from_bank(
            bank,
            out,
            ids=ids,
            label=label,
            like=like,
            cosine=cosine,
            weights=encoder_weights,
            progress=progress,
        )
    say(f"{out}: {_size(left)}; {num} removed")


def merge(first: Positional[Path], second: Positional[Path], /, out: Path) -> None:
    """Puts the rows of two banks of one encoder into one, in the format of the first.

    Example: stratagem bank merge cats.safetensors dogs.safetensors --out both.safetensors

    Args:
        first: A bank's file.
        second: Another one.
        out: The new bank's file.
    """
    say(f"{out}: {_size(merge_banks(first, second, out))}")


def interpolate(
    bank: Positional[Path],
    /,
    rows: tuple[int, int],
    out: Path,
    weights: tuple[float, ...] = (),
    way: Way = "spherical",
    seed: int = 0,
    label: int | None = None,
) -> None:
    """Adds rows between two rows of a bank.

    Example: stratagem bank interpolate bank.safetensors --rows 3 17 --weights 0.25 0.5 0.75
    --out path.safetensors

    Args:
        bank: The bank's file.
        rows: The two rows.
        out: The new bank's file.
        weights: Of the second row, one new row each; linear and spherical need them.
        way: How; masked takes half of the numbers of each row, at random; concatenated the first
            half of one and the second half of the other.
        seed: Of the masked way.
        label: Class of the new rows; by default that of both rows, or none.
    """
    longer = interpolate_bank(bank, rows, out, weights=weights, way=way, seed=seed, label=label)
    num = len(weights) or 1
    say(f"{out}: {_size(longer)}; {num} added, rows {longer.num - num} to {longer.num - 1}")


def nearest(
    bank: Positional[Path],
    images: Positional[Path],
    /,
    num: int = 10,
    encoder_weights: str | None = None,
    json: bool = False,
) -> None:
    """Finds the rows of a bank that are nearest to images.

    Example: stratagem bank nearest bank.safetensors photo.jpg --num 5

    Args:
        bank: The bank's file.
        images: An image or a folder of them.
        num: Rows per image.
        encoder_weights: Of a bank by DINOv2 or DINOv3, or imported from GMem: the encoder's weights
            for the images, a folder or a repository of the hub.
        json: Print JSON.
    """
    with progress_bar("bank nearest", "images") as progress:
        found = nearest_in_bank(bank, images, num, weights=encoder_weights, progress=progress)
    if json:
        say_json(found)
        return
    for line in found:
        for near in line["rows"]:
            say(f"{line['image']}  row {near['row']}  cosine {near['cosine']:.4f}  {near['id']}")


def _size(bank: MemoryBank) -> str:
    mirrored = " and mirror images" if bank.flips else ""
    codec = bank.store.codec
    rank = f" of rank {codec.rank}" if isinstance(codec, LowRank) else ""
    stored = f"{bank.format}{rank}, {amount(bank.nbytes)}"
    return f"{bank.num:,} images{mirrored}, {bank.dim} numbers each, {stored}"


def _share(quantile: float) -> str:
    return {0.0: "least", 0.5: "median"}.get(quantile, f"{quantile:.0%}")


def _lost(added: Added) -> str:
    """Of low-rank banks only: the others lose nothing worth a word."""
    if added.bank.format != "low-rank":
        return ""
    lost = added.residuals.amax(1)
    figures = f"{lost.median():.2f} (median) to {lost.max():.2f} (most)"
    return f"; of their length 1 the bank's directions miss {figures}"
