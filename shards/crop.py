"""A box of an image: the bits that slicing the whole decoded image would give, in less time.

The extension shards/crop_decode.c decodes only what the box needs of tidy baseline JPEGs, and, where they have restart
markers (shards/jpeg.py), only the segments that cover it. All other data, and all where the extension was not built,
Pillow decodes whole. It has the last word on what is broken, too: the extension leaves to it whatever libjpeg warns of.
"""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

try:
    from shards import _crop_decode  # type: ignore[attr-defined]
except ImportError:  # libjpeg-turbo's headers were not there when this package was installed
    _crop_decode = None

_MAX_PIXELS = 89_478_485  # above it Pillow warns, above twice that it refuses


class Box(NamedTuple):
    """In pixels."""

    top: int
    left: int
    height: int
    width: int


def has_crop_decode() -> bool:
    """Whether the extension was built."""
    return _crop_decode is not None


def decode_box(data: bytes, choose: Callable[[int, int], Box]) -> tuple[NDArray[np.uint8], Box]:
    """The pixels, RGB uint8 [height, width, 3], of the box that `choose(height, width)` of the image returns, and it.

    The bits, and the ValueError where the image cannot be read, are those of `decode`. ValueError, too, for a box that
    does not lie in the image.
    """
    size = _crop_decode.read_size(data) if _crop_decode else None
    if size is None or size[0] * size[1] > _MAX_PIXELS:
        image = decode(data)
        box = choose(image.height, image.width)
        return _slice(image, box), box
    box = choose(*size)
    pixels = _crop_decode.decode(data, *box)
    if pixels is None:
        return _slice(decode(data), box), box
    return np.ndarray((box.height, box.width, 3), np.uint8, pixels), box


def decode(data: bytes) -> Image.Image:
    """The image in `data` as Pillow RGB; alpha is dropped, 16-bit grey keeps its high byte, EXIF rotation is ignored.

    Raises ValueError, naming the cause, when Pillow cannot read the whole image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return to_rgb(image)
    except UnidentifiedImageError as error:  # whose message is an address in memory
        raise ValueError(f"cannot decode an image from {len(data)} bytes: Pillow knows no such format") from error
    except Exception as error:  # Pillow's plugins raise many types on bad bytes
        raise ValueError(f"cannot decode an image from {len(data)} bytes: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """As `decode` converts it."""
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16-bit grey at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info:  # the same pixels as a direct conversion, without its warning
        image = image.convert("RGBA")
    return image.convert("RGB")


def _slice(image: Image.Image, box: Box) -> NDArray[np.uint8]:
    top, left, height, width = box
    if not (0 <= top < top + height <= image.height and 0 <= left < left + width <= image.width):
        raise ValueError("the box lies outside the image")  # Pillow would pad it
    return np.array(image.crop((left, top, left + width, top + height)))
