"""What kind of image some bytes are, told from the bytes and never from a name."""

import io
from dataclasses import dataclass

from PIL import Image

from shards.errors import UserError


class BadImage(UserError):
    """Bytes that are no image a shard can hold; the message is the reason."""


@dataclass(frozen=True)
class ImageHeader:
    """`field`: the tar member's extension (jpg, png, webp); width and height in pixels, as stored."""

    field: str
    width: int
    height: int


def read_header(data: bytes) -> ImageHeader:
    """Type and size of an image, without decoding it; BadImage says why not."""
    if not data:
        raise BadImage("the file is empty")
    field, pillow_format = _sniff(data)
    try:
        with Image.open(io.BytesIO(data), formats=[pillow_format]) as image:
            return ImageHeader(field, image.width, image.height)
    except Exception as error:  # Pillow's readers raise many kinds
        raise BadImage(f"its {pillow_format} header cannot be read ({type(error).__name__}: {error})") from error


def _sniff(data: bytes) -> tuple[str, str]:
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg", "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png", "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp", "WEBP"
    raise BadImage(f"it is neither JPEG, PNG nor WebP (it begins with {data[:8].hex(' ')})")
