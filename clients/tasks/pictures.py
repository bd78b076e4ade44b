"""A user's own images: a folder with a folder of pictures for each class."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Le

from clients.places import DataError
from clients.tasks.folds import Fold, Folds
from clients.tasks.own import OwnData, Rows

Side = Annotated[int, Ge(1), Le(4_096)]
Channels = Literal[1, 3]

# Formats whose decoders are Pillow's own; PostScript, say, would start another program.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
_ENDINGS = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm"}
)
_MOST_PIXELS = 50_000_000


class ImageFolder(OwnData):
    """Images, (channels, height, width) float32, from `path`/<class>/…/<image>.

    PNG, JPEG, BMP, GIF (its first frame), TIFF, WebP and PPM. Each channel is standardised by the training
    images. Classes are the folders' names and count from 0 in sorted order; hidden files are left out.

    Args:
        path: the folder that holds the classes' folders.
        size: sides in pixels that every image is brought to; without it, all must have the same.
        channels: 1 for grey, 3 for colour; every image is converted.
        test_path: a folder like `path` to test on; without one, a fold of `path`.
        fold: which part of the images is the test set, 0 to folds - 1.
        folds: how many parts there are.

    Raises:
        DataError: there are no images, or one cannot be read; names the file.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        path: Path,
        *,
        size: Side | None = None,
        channels: Channels = 3,
        test_path: Path | None = None,
        fold: Fold = 0,
        folds: Folds = 5,
    ) -> None:
        self.settle(
            read_images(path, size, channels),
            None if test_path is None else read_images(test_path, size, channels),
            fold=fold,
            folds=folds,
            axes=(0, 2, 3),
        )


def read_images(path: Path, size: int | None, channels: Channels) -> Rows:
    """The images of a folder of classes, (n, channels, height, width) uint8, sorted by path.

    Raises:
        DataError: see `ImageFolder`.
    """
    path = path.expanduser()
    if not path.is_dir():
        raise DataError(f"there is no folder {path.absolute()}: it is to hold one folder a class")
    files = [
        (folder.name, file)
        for folder in sorted(path.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in _ENDINGS and not file.name.startswith(".") and file.is_file()
    ]
    if not files:
        raise DataError(
            f"{path} holds no images: <class>/<image> is looked for, with the endings "
            f"{' '.join(sorted(_ENDINGS))}"
        )
    images = same_size(
        [(str(file), read_image(file, str(file), size, channels)) for _, file in files]
    )
    return Rows(images, [name for name, _ in files], str(path))


def same_size(images: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """Named images as one array, (n, channels, height, width) uint8.

    Raises:
        DataError: one has another size than the first; names it.
    """
    first = images[0][1].shape
    for name, image in images:
        if image.shape != first:
            raise DataError(
                f"{name} has {image.shape[2]} × {image.shape[1]} pixels, {images[0][0]} has "
                f"{first[2]} × {first[1]}: bring all to one size with task.size"
            )
    return np.stack([image for _, image in images])


def read_image(source: Path | bytes, name: str, size: int | None, channels: Channels) -> np.ndarray:
    """One image, (channels, height, width) uint8.

    Args:
        source: a file, or what is in one.
        name: for messages.
        size: both sides; None leaves them.
        channels: 1 or 3.

    Raises:
        DataError: it cannot be read, or has more than 50 million pixels.
    """
    from PIL import Image  # only tasks with images need it

    opened: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(opened, formats=_FORMATS) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise DataError(
                        f"{name} has {image.width} × {image.height} pixels, more than "
                        f"{_MOST_PIXELS:,}: make it smaller"
                    )
                if image.mode.startswith(("I", "F")):  # Pillow would cut these off at 255
                    raise DataError(
                        f"{name} has more than 8 bits a channel (mode {image.mode}): "
                        "scale it to 0 … 255 and save it with 8"
                    )
                pixels = image.convert("L" if channels == 1 else "RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{name} has too many pixels: {error}") from error
    except DataError:
        raise
    except Exception as error:  # decoders of broken files raise whatever they trip over
        raise DataError(f"{name} cannot be read as an image: {error}") from error
    if size is not None:
        pixels = pixels.resize((size, size), Image.Resampling.BILINEAR)
    array = np.asarray(pixels, dtype=np.uint8)
    return array.reshape(pixels.height, pixels.width, channels).transpose(2, 0, 1)
