"""data/images.py: every pixel format and every kind of broken file, made on the fly."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stratagem.data.images import (
    BadImage,
    Listing,
    center_crop,
    find_images,
    load_image,
    to_float,
    to_uint8,
)
from stratagem.errors import InputError

LEVELS = torch.arange(256, dtype=torch.uint8)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


# --- pixels <-> floats -------------------------------------------------------------------------


def test_pixels_survive_the_round_trip() -> None:
    x = to_float(LEVELS)
    assert x.dtype == torch.float32
    assert x[0] == -1
    assert x[255] == 1
    assert torch.equal(to_uint8(x), LEVELS)
    assert torch.equal(to_uint8(x + 0.4 / 127.5), LEVELS)
    assert torch.equal(to_uint8(x - 0.4 / 127.5), LEVELS)


def test_floats_outside_the_range_are_clamped() -> None:
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_pixels_are_mapped_once_only() -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        to_float(to_float(LEVELS))


# --- finding -----------------------------------------------------------------------------------


def test_images_are_listed_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/deep/er/1.PNG", "a/9.png", "loose.png", "a b/x.png"):
        save(tmp_path / name, noise(2, 2))
    for name in ("notes.txt", "a/.hidden.png", ".git/x.png", "c/readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    listing = find_images(tmp_path)
    names = [listing.name(index) for index in range(len(listing.paths))]
    assert names == ["a/9.png", "a b/x.png", "b/2.png", "b/deep/er/1.PNG", "loose.png"]
    assert listing == Listing(tmp_path, [tmp_path / name for name in names])


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    save(tmp_path / "real" / "x.png", noise(2, 2))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "class").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "up").symlink_to(tmp_path / "root")
    listing = find_images(tmp_path / "root")
    assert [listing.name(i) for i in range(len(listing.paths))] == ["class/x.png"]


def test_names_that_are_not_unicode_become_so(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    name = find_images(tmp_path).name(0)
    assert name == "caf\N{REPLACEMENT CHARACTER}.png"
    name.encode()


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no images in"):
        find_images(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        find_images(save(tmp_path / "x.png", noise(2, 2)))


# --- cropping ----------------------------------------------------------------------------------


def test_an_image_of_the_right_size_is_left_alone() -> None:
    pixels = noise(16, 16, 3)
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(pixels), 16)), pixels)


def test_the_centre_is_cut() -> None:
    wide, tall = noise(16, 27, 3), noise(29, 16, 3)
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(wide), 16)), wide[:, 5:21])
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(tall), 16)), tall[6:22])


@pytest.mark.parametrize("halvings", [1, 2, 3])
def test_large_images_are_halved_by_area_mean(halvings: int) -> None:
    factor = 2**halvings
    pixels = noise(8 * factor, 8 * factor)
    ours = np.asarray(center_crop(Image.fromarray(pixels), 8))
    mean = pixels.astype(int)
    for _ in range(halvings):  # rows, then columns, each rounded to the nearest, halves up
        mean = (mean[:, ::2] + mean[:, 1::2] + 1) // 2
        mean = (mean[::2] + mean[1::2] + 1) // 2
    assert np.array_equal(ours, mean)


def test_the_rest_is_scaled_bicubically() -> None:
    image = Image.fromarray(noise(23, 23, 3))
    expected = image.resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(center_crop(image, 16)), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("side", [(61, 40), (40, 61), (37, 133), (300, 19), (19, 20), (97, 97)])
def test_the_crop_is_adms(mode: str, side: tuple[int, int]) -> None:
    """The formula as it is published: everything is scaled, and then cut."""
    image = whole = Image.fromarray(noise(*side, 3)).convert(mode)
    while min(whole.size) >= 2 * 16:
        halves = (whole.width // 2, whole.height // 2)
        whole = whole.resize(halves, Image.Resampling.BOX)
    scale = 16 / min(whole.size)
    width, height = round(whole.width * scale), round(whole.height * scale)
    whole = whole.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - 16) // 2, (height - 16) // 2
    expected = np.asarray(whole)[top : top + 16, left : left + 16]
    assert np.array_equal(np.asarray(center_crop(image, 16)), expected)


def test_small_images_are_scaled_up() -> None:
    cropped = center_crop(Image.fromarray(np.full((3, 5), 77, np.uint8)), 32)
    assert cropped.size == (32, 32)
    assert np.unique(np.asarray(cropped)).tolist() == [77]


# --- formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "gif", "ppm"])
def test_lossless_formats_give_their_pixels(tmp_path: Path, suffix: str) -> None:
    pixels = np.repeat(noise(8, 8, 1), 3, 2)  # gray, so that a palette of 256 holds it
    path = save(tmp_path / f"x.{suffix}", pixels, lossless=True)
    loaded = load_image(path, 8)
    assert loaded.dtype == torch.uint8
    assert loaded.is_contiguous()
    assert torch.equal(loaded, torch.from_numpy(pixels).permute(2, 0, 1))


def test_rows_columns_and_channels_keep_their_places(tmp_path: Path) -> None:
    pixels = noise(8, 8, 3)
    loaded = load_image(save(tmp_path / "x.png", pixels), 8)
    assert torch.equal(loaded, torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_becomes_what_is_asked_for(tmp_path: Path, mode: str, channels: int) -> None:
    white = np.full((4, 4, 3), 255, np.uint8)
    loaded = load_image(save(tmp_path / "x.png", white, mode), 4, channels)  # type: ignore[arg-type]
    assert torch.equal(loaded, torch.full((channels, 4, 4), 255, dtype=torch.uint8))


def test_gray_is_luminance(tmp_path: Path) -> None:
    green = np.zeros((4, 4, 3), np.uint8)
    green[..., 1] = 200
    loaded = load_image(save(tmp_path / "x.png", green), 4, 1)
    assert loaded.unique().tolist() == [round(0.587 * 200)]


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 3] = [0, 64, 128, 255]  # black, more and more opaque from left to right
    loaded = load_image(save(tmp_path / "x.png", pixels), 4)
    assert loaded[0, 0].tolist() == [255, 191, 127, 0]


def test_a_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "x.png", transparency=1)
    loaded = load_image(tmp_path / "x.png", 2)
    assert loaded[:, 0, 0].tolist() == [10, 20, 30]
    assert loaded[:, 0, 1].tolist() == [255, 255, 255]


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    cyan = np.zeros((8, 8, 4), np.uint8)
    cyan[..., 0] = 255
    Image.merge("CMYK", [Image.fromarray(cyan[..., i]) for i in range(4)]).save(
        tmp_path / "x.jpg", quality=100
    )
    red, green, blue = load_image(tmp_path / "x.jpg", 8).float().mean((1, 2)).tolist()
    assert red < 5
    assert min(green, blue) > 250


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_cut(tmp_path: Path, suffix: str) -> None:
    pixels = (np.arange(16).reshape(4, 4) * 17 * 257).astype(np.uint16)
    loaded = load_image(save(tmp_path / f"x.{suffix}", pixels), 4)
    assert loaded[2].flatten().tolist() == [17 * i for i in range(16)]


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What a viewer shows of stored pixels, from the EXIF standard's table."""
    anti = pixels[::-1, ::-1].swapaxes(0, 1)
    views = [
        pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1], pixels.swapaxes(0, 1),
        np.rot90(pixels, -1), anti, np.rot90(pixels),
    ]  # fmt: skip
    return views[orientation - 1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    pixels, exif = noise(8, 8, 3), Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"x.{suffix}", pixels, exif=exif, lossless=True)
    expected = torch.from_numpy(turned(pixels, orientation).copy()).permute(2, 0, 1)
    assert torch.equal(load_image(path, 8), expected)


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("L", (4, 4), value) for value in (30, 200)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "x.gif", 4, 1).unique().tolist() == [30]


# --- broken files ------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    save(path, noise(64, 64, 3))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def altered(path: Path) -> None:
    save(path, noise(64, 64, 3))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


BROKEN = {
    "empty.png": lambda path: path.write_bytes(b""),
    "text.jpg": lambda path: path.write_text("<html>404</html>"),
    "head.png": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40),
    "cut.png": truncated,
    "cut.jpg": truncated,
    "cut.webp": truncated,
    "altered.png": altered,
    "float.tiff": lambda path: save(path, np.ones((4, 4), np.float32)),
    "int.tiff": lambda path: save(path, np.full((4, 4), 1 << 20, np.int32)),
    "gone.png": lambda path: path.symlink_to("nowhere.png"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_says_why_and_not_where(tmp_path: Path, name: str) -> None:
    BROKEN[name](tmp_path / name)
    with pytest.raises(BadImage) as caught:
        load_image(tmp_path / name, 8)
    cause = str(caught.value)
    assert cause
    assert "\n" not in cause
    assert str(tmp_path) not in cause


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [11, 30])
def test_a_decompression_bomb_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    fine, bomb = save(tmp_path / "f.png", noise(10, 10)), save(tmp_path / "b.png", noise(10, side))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    load_image(fine, 8)
    with pytest.raises(BadImage, match=r"too large|DecompressionBomb"):
        load_image(bomb, 8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_a_single_row_of_pixels_is_no_picture(tmp_path: Path, shape: tuple[int, int]) -> None:
    with pytest.raises(BadImage, match=f"^too small: {shape[1]} x {shape[0]} pixels$"):
        load_image(save(tmp_path / "x.png", noise(*shape)), 8)
    assert load_image(save(tmp_path / "y.png", noise(2, 2)), 8).shape == (3, 8, 8)


def test_a_hair_thin_image_is_not_blown_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thin = save(tmp_path / "x.png", noise(2, 450))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImage, match="too large"):
        load_image(thin, 8)
