"""A folder of images."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from clients.places import DataError
from clients.tasks import ImageFolder
from clients.tasks.pictures import read_image, read_images
from clients.tasks.task import check_task


@pytest.fixture
def folder(tmp_path):
    """Dark images in one class, bright ones in the other, in different formats."""
    rng = np.random.default_rng(0)
    for name, level in (("night", 20), ("day", 200)):
        (tmp_path / name / "more").mkdir(parents=True)
        for number, ending in enumerate(["png", "jpg", "bmp", "webp", "tiff"] * 2):
            pixels = rng.integers(level, level + 50, (6, 8, 3), dtype=np.uint8)
            place = tmp_path / name / ("more" if number > 4 else ".")
            Image.fromarray(pixels).save(place / f"{number}.{ending}")
    (tmp_path / "night" / "notes.txt").write_text("no image")
    (tmp_path / "night" / ".hidden.png").write_text("no image")
    (tmp_path / ".git").mkdir()
    (tmp_path / "readme.png").write_text("no class")
    return tmp_path


def test_folders_are_classes_and_channels_are_standardised(folder):
    task = ImageFolder(folder)
    check_task(task)
    assert (task.classes, task.input_shape, task.num_classes) == (["day", "night"], (3, 6, 8), 2)
    assert (len(task.train()), len(task.test())) == (16, 4)
    inputs = task.train().inputs
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    bright = inputs.mean((1, 2, 3)) > 0
    assert torch.equal(bright, task.train().targets == 0)


@pytest.mark.parametrize(
    ("settings", "shape"), [({"size": 4}, (3, 4, 4)), ({"channels": 1}, (1, 6, 8))]
)
def test_size_and_channels_can_be_chosen(folder, settings, shape):
    assert ImageFolder(folder, **settings).input_shape == shape


def test_a_test_folder_can_be_named(folder):
    task = ImageFolder(folder, test_path=folder)
    assert len(task.train()) == len(task.test()) == 20


def test_palettes_transparency_and_16_bits_are_converted(tmp_path):
    image = Image.fromarray(np.full((4, 4, 3), (10, 20, 30), dtype=np.uint8))
    for mode in ("P", "RGBA", "L", "1", "CMYK", "LA"):
        ending = "tiff" if mode == "CMYK" else "png"
        image.convert(mode).save(tmp_path / f"{mode}.{ending}")
        assert read_image(tmp_path / f"{mode}.{ending}", "name", None, 3).shape == (3, 4, 4)


def test_images_of_unequal_size_need_a_size(folder):
    Image.new("RGB", (9, 6)).save(folder / "day" / "wide.png")
    with pytest.raises(DataError, match=r"wide\.png has 9 × 6 pixels, .* has 8 × 6: .* task.size"):
        ImageFolder(folder)
    assert ImageFolder(folder, size=5).input_shape == (3, 5, 5)


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_an_image_that_cannot_be_read_is_named(folder, content):
    (folder / "day" / "broken.png").write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.png cannot be read as an image"):
        ImageFolder(folder)


def test_an_image_that_was_cut_off_is_named(folder):
    whole = (folder / "day" / "0.png").read_bytes()
    (folder / "day" / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"0\.png cannot be read as an image"):
        ImageFolder(folder)


@pytest.mark.parametrize("side", [7_100, 10_000, 50_000])
def test_a_small_file_with_a_vast_image_is_refused_before_it_is_unpacked(tmp_path, side):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(99)))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(DataError, match=r"bomb\.png has .*pixels"):
        read_image(tmp_path / "bomb.png", str(tmp_path / "bomb.png"), None, 3)


def test_a_folder_without_images_or_none_at_all_is_refused(tmp_path):
    (tmp_path / "class").mkdir()
    with pytest.raises(DataError, match="holds no images: <class>/<image> is looked for"):
        read_images(tmp_path, None, 3)
    with pytest.raises(DataError, match=r"there is no folder .*/none"):
        read_images(tmp_path / "none", None, 3)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_images_of_more_than_eight_bits_are_refused_rather_than_cut_off(tmp_path, dtype):
    pixels = np.linspace(0, 60_000, 64).reshape(8, 8).astype(dtype)
    Image.fromarray(pixels).save(tmp_path / "deep.tiff")
    with pytest.raises(DataError, match="more than 8 bits a channel"):
        read_image(tmp_path / "deep.tiff", "deep.tiff", None, 1)
