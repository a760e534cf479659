"""Pixels of images: decoding, resizing, turning, encoding. Arrays are uint8 [height, width, 3], RGB.

Pillow decodes and encodes, so that an image counts as readable where Pillow reads it. JPEGs that are resized take a
faster way to pixels as good: simplejpeg, told to decode at a fraction of the size where that is at least twice what is
asked for, and OpenCV.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.errors import UserError
from shards.jpeg import read_frame, restart_interval

Pixels = NDArray[np.uint8]

PILLOW_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_MAX_SIDE = {"jpg": 65_500, "webp": 16_383}  # pixels that libjpeg and WebP can write
_MCU = 16  # pixels: the width of an MCU in 4:2:0
# Of each EXIF orientation: whether rows and columns change places, then whether rows, then columns, are reversed.
_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


@contextmanager
def opened(data: bytes, field: str) -> Iterator[Image.Image]:
    """The image in Pillow, not yet decoded; what Pillow raises, here or in the body, becomes a ValueError.

    Opening checks the header, bounds what text chunks inflate to, and touches no memory for pixels.
    """
    try:
        # Pillow warns of broken EXIF data and the like, which do no harm here; the filters are put back at once.
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(data), formats=[PILLOW_FORMATS[field]]) as image,
        ):
            yield image
    except Exception as error:  # Pillow's readers raise many kinds
        raise ValueError(f"{type(error).__name__}: {error}") from error


def check_decodes(data: bytes, field: str) -> None:
    """ValueError where the image cannot be decoded to its end."""
    with opened(data, field) as image:
        image.load()


def decode(data: bytes, field: str) -> Pixels:
    """All pixels, as stored, the way Pillow's `convert("RGB")` makes them; ValueError says why not.

    So grey becomes three equal channels, a palette its colours, CMYK (inverted where Adobe's marker says so) the simple
    complement, and alpha is dropped, not blended. 16-bit samples keep their high byte; `convert` would clip grey ones.
    """
    with opened(data, field) as image:
        if image.mode == "I;16":
            high_bytes = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(high_bytes[:, :, None], 3, axis=2)
        return np.asarray(image.convert("RGB"))


def decode_resized(data: bytes, field: str, size: tuple[int, int]) -> Pixels:
    """The image at `size` = (width, height), antialiased; ValueError where it cannot be decoded to its end.

    On photographs it differs from Pillow's BICUBIC by 1.1 to 1.7 levels on average, as LANCZOS does by 0.9 to 1.3
    (measured). The bits do not depend on what the CPU can do.
    """
    pixels = _decode_scaled(data, size) if field == "jpg" else None
    if pixels is None:
        full = decode(data, field)
        pixels = full, (float(full.shape[1]), float(full.shape[0]))
    return _resized(*pixels, size)


def _decode_scaled(data: bytes, size: tuple[int, int]) -> tuple[Pixels, tuple[float, float]] | None:
    """The pixels at n/8 of their number, n as small as leaves twice `size`, and the width and height they stand for.

    None for what is left to Pillow: CMYK, whose conversion is to be the same everywhere, and data of which libjpeg
    warns, be they cut short or merely untidy.
    """
    frame = read_frame(data)
    if len(frame.sampling) > 3:
        return None
    try:
        pixels = _simplejpeg().decode_jpeg(data, min_width=2 * size[0], min_height=2 * size[1], min_factor=2)
    except ValueError:
        return None
    # n/8 of the sides is seldom whole: libjpeg pads the last column and row.
    eighths = 8 * pixels.shape[1] // frame.width
    return pixels, (frame.width * eighths / 8, frame.height * eighths / 8)


def _resized(pixels: Pixels, extent: tuple[float, float], size: tuple[int, int]) -> Pixels:
    """Sides that shrink are averaged over areas; sides that grow, then, interpolated linearly."""
    cv2 = _cv2()
    factors = [min(1.0, side / whole) for side, whole in zip(size, extent, strict=True)]
    if min(factors) < 1:
        # OpenCV averages floats faster than bytes (638 against 755 us for 500x375 to 341x256), to the same result.
        floats = pixels.astype(np.float32)
        means = cv2.resize(floats, None, fx=factors[0], fy=factors[1], interpolation=cv2.INTER_AREA)
        pixels = cv2.convertScaleAbs(means)
    if pixels.shape[1::-1] != size:
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR_EXACT)  # the only one exact on every CPU
    return pixels


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """The pixels of an image with that EXIF orientation (1 to 8) as they are to be seen."""
    transposed, rows, columns = _TURNS[orientation]
    pixels = pixels.swapaxes(0, 1) if transposed else pixels
    return np.ascontiguousarray(pixels[:: -1 if rows else 1, :: -1 if columns else 1])


def encode(pixels: Pixels, field: str, quality: int, restart_markers: bool, with_opencv: bool) -> bytes:
    """An image file without metadata: JPEG (4:2:0) and WebP at `quality`, PNG lossless; ValueError for too long a side.

    `restart_markers` go into a JPEG, as far apart as shards/jpeg.py inserts them. `with_opencv`, JPEGs take three
    quarters of Pillow's time; the bytes are the same.
    """
    side = max(pixels.shape)
    if side > _MAX_SIDE.get(field, side):
        raise ValueError(f"{side} pixels on a side, and {PILLOW_FORMATS[field]} holds {_MAX_SIDE[field]} at most")
    interval = restart_interval(-(-pixels.shape[1] // _MCU)) if restart_markers else 0
    if field == "jpg" and with_opencv:
        return _encode_with_opencv(pixels, quality, interval)
    options: dict[str, dict[str, Any]] = {
        "jpg": {"quality": quality, "subsampling": "4:2:0", "restart_marker_blocks": interval},
        "png": {},
        "webp": {"quality": quality},
    }
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, PILLOW_FORMATS[field], **options[field])
    return buffer.getvalue()


def _encode_with_opencv(pixels: Pixels, quality: int, interval: int) -> bytes:
    cv2 = _cv2()
    options = {
        cv2.IMWRITE_JPEG_QUALITY: quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR: cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
        cv2.IMWRITE_JPEG_RST_INTERVAL: interval,
    }
    flat = [number for option in options.items() for number in option]
    encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), flat)[1]
    return encoded.tobytes()


def check_libraries() -> None:
    """UserError where resizing cannot be done."""
    _simplejpeg()


def _simplejpeg() -> ModuleType:
    try:
        import simplejpeg
    except ImportError as error:
        raise UserError(
            f"resizing images needs the package simplejpeg ({error}): pip install 'vittm-pipeline[data]', or resize "
            "none"
        ) from error
    return simplejpeg


@cache
def _cv2() -> ModuleType:
    import cv2

    # Shards are made by many processes; each of them with a thread a core would only get in each other's way.
    cv2.setNumThreads(1)
    return cv2
