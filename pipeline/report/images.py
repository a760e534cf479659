"""Pictures within a page."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SMALL = 64  # pixels: below, a JPEG's blocks would be seen
QUALITY = 88


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """uint8 [H, W, 3]: a PNG where it is small, else a JPEG."""
    kind = "PNG" if max(pixels.shape) <= SMALL else "JPEG"
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=QUALITY)
    return _uri(buffer.getvalue(), kind)


def smaller(png: bytes) -> str:
    """Of a PNG, or of the JPEG of it, which is smaller."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "JPEG", quality=QUALITY)
    return _uri(png, "PNG") if len(png) <= buffer.tell() else _uri(buffer.getvalue(), "JPEG")


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
