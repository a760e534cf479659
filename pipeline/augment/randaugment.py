"""RandAugment's operations on uint8 arrays, bit for bit what torchvision makes of Pillow images.

Each operation follows Pillow's arithmetic: 16.16 fixed-point sampling in `libImaging/Geometry.c`, integer grey in
`Convert.c`, single-precision blending, cut off rather than rounded, in `Blend.c`, and the tables of `ImageOps.py`.
What makes it quick is OpenCV's vector code, tables that are kept, and arrays that are never turned into images.

Shapes: H height, W width; an image is uint8 [H, W, 3], RGB, C-contiguous, of sides below 32,768 (beyond, Pillow samples
otherwise) and fewer than 2**24 pixels (single precision counts them).
"""

import functools
import math
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = np.ndarray  # uint8 [H, W, 3]: no more precise, because OpenCV's stubs are not

LEVELS = np.arange(256)
# Pillow's weights of R, G, B in 65536ths (ITU-R 601-2), and the half by which it rounds: exact in single precision.
GREY = np.array([[19595, 38470, 7471, 1 << 15]], np.float32) / (1 << 16)
# OpenCV rounds to the nearest level and Pillow cuts off. What a blend gives lies, but for rounding errors of 1e-4, on a
# level or 0.01 below one for factors in hundredths, as all of RandAugment's are.
ROUNDING = 0.005
CUT_OFF = ROUNDING - 0.5


def apply(pixels: NDArray[np.uint8], name: str, magnitude: float) -> NDArray[np.uint8]:
    """The image after one operation; `name` and `magnitude`, signed, are as in torchvision's RandAugment.

    The result has the same shape and may be `pixels` itself, which is never written to. Areas that come from outside
    the image are black. ValueError for a name that RandAugment does not have.
    """
    if name not in OPERATIONS:
        raise ValueError(f"RandAugment has no operation {name!r}, only {', '.join(OPERATIONS)}")
    return OPERATIONS[name](pixels, magnitude)


# --- warps


def _translate(pixels: Pixels, magnitude: float, axis: int) -> Pixels:
    shift = int(magnitude)
    moved = np.zeros_like(pixels)
    to, source = moved.swapaxes(0, axis), pixels.swapaxes(0, axis)
    if shift < 0:
        to[:shift] = source[-shift:]
    else:
        to[shift:] = source[: max(len(source) - shift, 0)]
    return moved


def _warp(pixels: Pixels, magnitude: float, matrix: Callable[[float, int, int], tuple[float, ...]]) -> Pixels:
    """Gathers four bytes at a time: twice as quick as OpenCV's warps, which sample elsewhere than Pillow."""
    height, width, _ = pixels.shape
    words = np.empty(height * width + 1, np.uint32)
    words[-1] = 0  # what `_sources` points at for pixels from outside
    cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA, dst=words[:-1].view(np.uint8).reshape(height, width, 4))
    moved = words.take(_sources(matrix, magnitude, height, width), mode="wrap")  # the quickest mode; nothing wraps
    return cv2.cvtColor(moved.view(np.uint8).reshape(height, width, 4), cv2.COLOR_RGBA2RGB)


@functools.lru_cache(maxsize=16)  # 0.4 MB each at 224 pixels; one size and magnitude takes six
def _sources(
    matrix: Callable[[float, int, int], tuple[float, ...]], magnitude: float, height: int, width: int
) -> NDArray[np.intp]:
    """[H, W]: where in the flattened image each pixel comes from, or H * W for outside; `affine_fixed` of Geometry.c.

    A matrix (a, b, c, d, e, f) says that (x, y) comes from (a x + b y + c, d x + e y + f), at pixel centres.
    """
    a, b, c, d, e, f = matrix(magnitude, height, width)
    rows, columns = np.mgrid[:height, :width]
    x = (_fixed(c + a * 0.5 + b * 0.5) + _fixed(a) * columns + _fixed(b) * rows) >> 16
    y = (_fixed(f + d * 0.5 + e * 0.5) + _fixed(d) * columns + _fixed(e) * rows) >> 16
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return np.where(inside, y * width + x, height * width)


def _fixed(value: float) -> int:
    return math.floor(value * 65536 + 0.5)


def _shear_x(magnitude: float, height: int, width: int) -> tuple[float, ...]:
    return 1, magnitude, 0, 0, 1, 0


def _shear_y(magnitude: float, height: int, width: int) -> tuple[float, ...]:
    return 1, 0, 0, magnitude, 1, 0


def _rotation(magnitude: float, height: int, width: int) -> tuple[float, ...]:
    """`PIL.Image.Image.rotate`: counter-clockwise degrees about the centre."""
    angle = -math.radians(magnitude % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


# --- blends: from a degenerate image (factor 0) through the image itself (factor 1) and beyond


def _brightness(pixels: Pixels, magnitude: float) -> Pixels:
    return _blend_level(0, pixels, 1.0 + magnitude)


def _contrast(pixels: Pixels, magnitude: float) -> Pixels:
    grey = _grey(pixels)
    return _blend_level(int(cv2.sumElems(grey)[0] / grey.size + 0.5), pixels, 1.0 + magnitude)


def _color(pixels: Pixels, magnitude: float) -> Pixels:
    return _blend(cv2.cvtColor(_grey(pixels), cv2.COLOR_GRAY2RGB), pixels, 1.0 + magnitude)


def _sharpness(pixels: Pixels, magnitude: float) -> Pixels:
    sharpened = _blend(_smooth(pixels), pixels, 1.0 + magnitude)
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        sharpened[edge] = pixels[edge]
    return sharpened


def _grey(pixels: Pixels) -> Pixels:
    """[H, W]; cv2's own conversion, of 15 bits, is a level off in one pixel of a thousand."""
    return cv2.transform(pixels.astype(np.float32), GREY).astype(np.uint8)


def _smooth(pixels: Pixels) -> Pixels:
    """Pillow's SMOOTH, rounded: the nine pixels around and four times the middle one again, over 13. Not of edges."""
    total: np.ndarray = cv2.boxFilter(pixels, cv2.CV_16U, (3, 3), normalize=False)
    middle = pixels.astype(np.uint16)
    middle *= 4
    total += middle
    total += 6
    total //= 13
    return total.astype(np.uint8)


def _blend(degenerate: Pixels, pixels: Pixels, factor: float) -> Pixels:
    if _cuts_off_alike(factor):
        return cv2.addWeighted(pixels, factor, degenerate, 1 - factor, CUT_OFF)
    return _blend_in_float(degenerate, pixels, factor)


def _blend_level(level: int, pixels: Pixels, factor: float) -> Pixels:
    if _cuts_off_alike(factor):
        return cv2.addWeighted(pixels, factor, pixels, 0, (1 - factor) * level + CUT_OFF)
    return cv2.LUT(pixels, _blend_in_float(np.uint8(level), LEVELS.astype(np.uint8), factor))


@functools.lru_cache(maxsize=128)
def _cuts_off_alike(factor: float) -> bool:
    """Whether OpenCV's blend with CUT_OFF is Pillow's for all pairs of levels, with a margin for its rounding errors.

    It is not where Pillow's own rounding takes it below a whole level here and there: 10 of RandAugment's 61 factors.
    """
    degenerate, pixels = np.mgrid[:256, :256]
    pillow = _blend_in_float(degenerate.astype(np.uint8), pixels.astype(np.uint8), factor)
    blend = factor * pixels + (1 - factor) * degenerate
    return all(
        np.array_equal(np.floor(blend + shift).clip(0, 255), pillow) for shift in (ROUNDING * 0.9, ROUNDING * 1.1)
    )


def _blend_in_float(degenerate: Pixels | np.uint8, pixels: Pixels, factor: float) -> Pixels:
    """`Blend.c`, operation by operation."""
    start = np.float32(degenerate)
    blend = pixels - start
    blend *= np.float32(factor)
    blend += start
    return blend.clip(0, 255, out=blend).astype(np.uint8)


# --- tables: a new level for each old one


def _posterize(pixels: Pixels, magnitude: float) -> Pixels:
    return np.bitwise_and(pixels, np.uint8(256 - (1 << (8 - int(magnitude)))))


def _solarize(pixels: Pixels, magnitude: float) -> Pixels:
    above = cv2.threshold(pixels, math.ceil(magnitude) - 1, 255, cv2.THRESH_BINARY)[1]
    return np.bitwise_xor(pixels, above, out=above)


def _autocontrast(pixels: Pixels, magnitude: float) -> Pixels:
    return _look_up(pixels, lambda plane: _stretched(*cv2.minMaxLoc(plane)[:2]))


def _equalize(pixels: Pixels, magnitude: float) -> Pixels:
    return _look_up(pixels, _equalized)


def _look_up(pixels: Pixels, table: Callable[[Pixels], Pixels]) -> Pixels:
    """Each channel through a table of its own, which depends on what is in it."""
    return cv2.merge([cv2.LUT(plane, table(plane)) for plane in cv2.split(pixels)])


@functools.lru_cache(maxsize=4096)
def _stretched(low: float, high: float) -> Pixels:
    """[256]: from `low` to `high` to 0 to 255."""
    scale = 255.0 / (high - low) if high > low else 1.0
    offset = -low * scale if high > low else 0.0
    return (LEVELS * scale + offset).clip(0, 255).astype(np.uint8)


def _equalized(plane: Pixels) -> Pixels:
    """[256]: what makes the levels of a channel [H, W] about equally frequent."""
    counts = cv2.calcHist([plane], [0], None, [256], [0, 256]).ravel().astype(np.int64)
    below = counts.cumsum() - counts
    step = int(below[counts.nonzero()[0][-1]]) // 255  # of all pixels but those of the highest level
    table = (step // 2 + below) // step if step else LEVELS
    return np.minimum(table, 255).astype(np.uint8)


OPERATIONS: dict[str, Callable[[Pixels, float], Pixels]] = {
    "Identity": lambda pixels, magnitude: pixels,
    "ShearX": functools.partial(_warp, matrix=_shear_x),
    "ShearY": functools.partial(_warp, matrix=_shear_y),
    "TranslateX": functools.partial(_translate, axis=1),
    "TranslateY": functools.partial(_translate, axis=0),
    "Rotate": functools.partial(_warp, matrix=_rotation),
    "Brightness": _brightness,
    "Color": _color,
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}
