"""From the bytes of a file to those of a sample's image: untouched where they can be, re-encoded where they must.

What an image is, its bytes say; its name never does.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from shards import jpeg, raster
from shards.errors import UserError

# Resizing so many takes up to 1.8 GB of a worker's memory (measured); a header can claim a hundred times that.
MAX_PIXELS = 100_000_000
_MAX_INFLATED = 1 << 26  # bytes; what a gzip-compressed image may come to
_GZIP = b"\x1f\x8b"
_SIDES = range(16, 4097)
FORMATS = ("keep", "jpg", "webp")
_JPEG_SUFFIXES = (".jpg", ".jpeg")
_JPEG_COLOURS = {1: "grey", 3: "RGB", 4: "CMYK"}  # by the number of components
_PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}  # by the colour type


class BadImage(UserError):
    """Bytes that are no image a shard can hold; the message is the reason."""


@dataclass(frozen=True)
class ImageHeader:
    """`field`: the tar member's extension (jpg, png, webp); width and height in pixels, as stored."""

    field: str
    width: int
    height: int


@dataclass(frozen=True)
class ImageOptions:
    """What becomes of images. UserError for bad values.

    `resize`: none; `short:N`, the shorter side to N pixels where it is longer; or `squash:N`, to N x N, aspect ignored,
    where the longer side has N or more. `quality`: of JPEG and WebP that are encoded anew, 1 to 100. `restart_markers`:
    in every JPEG that can have them (shards/jpeg.py). `format`: keep, jpg or webp. `verify`: decode images that are
    copied, too.
    """

    resize: str = "none"
    quality: int = 90
    restart_markers: bool = False
    format: str = "keep"
    verify: bool = False

    def __post_init__(self) -> None:
        _parse_resize(self.resize)
        if not 1 <= self.quality <= 100:
            raise UserError(f"a quality of {self.quality}: it is from 1 to 100; 90 is usual")
        if self.format not in FORMATS:
            raise UserError(f"an image format {self.format!r}: choose one of {', '.join(FORMATS)}")

    def check_tools(self) -> None:
        """UserError where a program or library that these options need is missing, before any work."""
        if self.restart_markers:
            jpeg.check_jpegtran()
        if self.resize != "none":
            raster.check_libraries()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A sample's image; `changes` says in words what was done to the file's bytes, and is empty for nothing."""

    field: str
    data: bytes
    width: int
    height: int
    changes: str


@dataclass(frozen=True, slots=True)
class _Facts:
    """An image as stored. `colours`: what its pixels are, in words; `orientation`: EXIF's, 1 to 8."""

    field: str
    width: int
    height: int
    colours: str
    orientation: int

    @property
    def upright_size(self) -> tuple[int, int]:
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)

    @property
    def must_change(self) -> bool:
        """Whether common readers would fail on it, or show it wrongly."""
        return self.colours == "CMYK" or self.colours.startswith("16-bit") or self.orientation != 1


def read_header(data: bytes) -> ImageHeader:
    """Type and size of an image, without decoding it; BadImage says why not."""
    facts = _inspect(data)
    return ImageHeader(facts.field, facts.width, facts.height)


def prepare(data: bytes, filename: str, options: ImageOptions) -> Prepared:
    """The image to store for the bytes of the file `filename`; BadImage says why there is none.

    A gzip-compressed image is inflated first. Then its bytes are kept, unless it is resized; is not of the format asked
    for; is CMYK or 16-bit; has an EXIF orientation, which is applied; or is a PNG or WebP named as a JPEG, which
    becomes one. Then it is encoded anew, in its own type if nothing asks for another, as plain 8-bit RGB without
    metadata: grey, palette and alpha are kept in copies only. `raster.decode` says how colours are converted.
    """
    changes = []
    if data.startswith(_GZIP):
        data = _inflate(data)
        changes.append("gunzipped")
    facts = _inspect(data)
    field = _field(facts.field, filename, options.format)
    size = _target(options.resize, *facts.upright_size)
    if size is None and field == facts.field and not facts.must_change:
        return _copied(data, facts, options, changes)
    return _reencoded(data, facts, field, size, options, changes)


def _inflate(data: bytes) -> bytes:
    stream = zlib.decompressobj(wbits=31)  # 31: gzip's format
    try:
        inflated = stream.decompress(data, _MAX_INFLATED + 1)
    except zlib.error as error:
        raise BadImage(f"it is gzip-compressed, and cannot be inflated ({error})") from error
    if len(inflated) > _MAX_INFLATED:
        raise BadImage(f"it is gzip-compressed, and inflates to more than {_MAX_INFLATED} bytes")
    if not stream.eof:
        raise BadImage("it is gzip-compressed, and cut short")
    return inflated


def _inspect(data: bytes) -> _Facts:
    """BadImage for what is no image, has a broken header, or claims too many pixels; nothing is decoded."""
    if not data:
        raise BadImage("the file is empty")
    field = _sniff(data)
    try:
        facts = _inspect_jpeg(data) if field == "jpg" else _inspect_with_pillow(data, field)
    except ValueError as error:
        raise BadImage(f"its {raster.PILLOW_FORMATS[field]} header cannot be read ({error})") from error
    if facts.width * facts.height > MAX_PIXELS:
        raise BadImage(f"it is {facts.width}x{facts.height}, and {MAX_PIXELS} pixels are the limit")
    return facts


def _sniff(data: bytes) -> str:
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    raise BadImage(f"it is neither JPEG, PNG nor WebP (it begins with {data[:8].hex(' ')})")


def _inspect_jpeg(data: bytes) -> _Facts:
    frame = jpeg.read_frame(data)
    colours = _JPEG_COLOURS.get(len(frame.sampling))
    if colours is None or frame.process > 2 or frame.precision != 8:
        raise ValueError(
            f"SOF{frame.process} with {len(frame.sampling)} components of {frame.precision} bits: only SOF0 to SOF2 "
            "with 1, 3 or 4 components of 8 bits are widely read"
        )
    return _Facts("jpg", frame.width, frame.height, colours, frame.orientation)


def _inspect_with_pillow(data: bytes, field: str) -> _Facts:
    with raster.opened(data, field) as image:
        colours = "RGB with alpha" if image.mode == "RGBA" else "RGB"
        if field == "png":  # Pillow's mode does not tell all; IHDR is the first chunk
            colours = ("16-bit " if data[24] == 16 else "") + _PNG_COLOURS[data[25]]
        return _Facts(field, *image.size, colours, jpeg.exif_orientation(image.info.get("exif", b"")))


def _field(field: str, filename: str, image_format: str) -> str:
    """The type to store. One PNG among JPEGs, as ImageNet has, would trip readers that ask for the field jpg."""
    if image_format == "keep":
        return "jpg" if filename.lower().endswith(_JPEG_SUFFIXES) else field
    return image_format


@cache
def _parse_resize(resize: str) -> tuple[str, int]:
    if resize == "none":
        return resize, 0
    match = re.fullmatch(r"(short|squash):([0-9]{1,9})", resize)
    if match is None:
        raise UserError(f"a resize of {resize!r}: give none, short:N or squash:N, such as short:256")
    if int(match[2]) not in _SIDES:
        raise UserError(f"a resize to {match[2]} pixels: N is from {_SIDES.start} to {_SIDES.stop - 1}")
    return match[1], int(match[2])


def _target(resize: str, width: int, height: int) -> tuple[int, int] | None:
    """The size to resize to, or None; the longer side is rounded down, as by torchvision's Resize."""
    kind, side = _parse_resize(resize)
    shorter = min(width, height)
    if kind == "short" and shorter > side:
        return side * width // shorter, side * height // shorter
    if kind == "squash" and max(width, height) >= side and (width, height) != (side, side):
        return side, side
    return None


def _copied(data: bytes, facts: _Facts, options: ImageOptions, changes: list[str]) -> Prepared:
    try:
        if options.verify:
            raster.check_decodes(data, facts.field)
        marked = _with_restart_markers(data) if options.restart_markers and facts.field == "jpg" else data
    except ValueError as error:
        raise BadImage(f"it cannot be decoded ({error})") from error
    if marked is not data:
        changes = [*changes, "restart markers inserted, metadata dropped"]
    return Prepared(facts.field, marked, facts.width, facts.height, "; ".join(changes))


def _with_restart_markers(data: bytes) -> bytes:
    try:
        return jpeg.insert_restart_markers(data)
    except ValueError:
        # Either the image is cut short, or merely untidy: then it stays as it is, for others read it so.
        raster.check_decodes(data, "jpg")
        return data


def _reencoded(
    data: bytes, facts: _Facts, field: str, size: tuple[int, int] | None, options: ImageOptions, changes: list[str]
) -> Prepared:
    try:
        if size is None:
            pixels = raster.decode(data, facts.field)
        else:
            stored_size = (size[1], size[0]) if facts.orientation >= 5 else size
            pixels = raster.decode_resized(data, facts.field, stored_size)
    except ValueError as error:
        raise BadImage(f"it cannot be decoded ({error})") from error
    pixels = raster.upright(pixels, facts.orientation)
    try:
        encoded = raster.encode(pixels, field, options.quality, options.restart_markers, with_opencv=size is not None)
    except ValueError as error:
        raise BadImage(f"it cannot be encoded ({error})") from error
    changes = [*changes, *_changes(facts, field, size, options.restart_markers)]
    return Prepared(field, encoded, pixels.shape[1], pixels.shape[0], "; ".join(changes))


def _changes(facts: _Facts, field: str, size: tuple[int, int] | None, restart_markers: bool) -> Iterator[str]:
    if field != facts.field:
        yield f"{raster.PILLOW_FORMATS[facts.field]} to {raster.PILLOW_FORMATS[field]}"
    if facts.colours != "RGB":
        yield f"{facts.colours} to RGB"
    if facts.orientation != 1:
        yield f"rotated by EXIF orientation {facts.orientation}"
    if size is not None:
        yield "resized from {}x{}".format(*facts.upright_size)
    if restart_markers and field == "jpg":
        yield "restart markers inserted"
