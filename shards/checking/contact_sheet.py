"""A picture of samples with their labels: what a person can see in a glance and no check can."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from shards.durable import atomic_file
from shards.images import read_header
from shards.index import Index
from shards.keyed import Permutation
from shards.raster import decode
from shards.reader import BadSample, Reader

COLUMNS, ROWS = 8, 8
_SIDE = 160  # pixels: of a thumbnail
_GAP = 8
_LINE = 15
_FONT_SIZE = 12
_CELL = (_SIDE + _GAP, _SIDE + 2 * _LINE + _GAP)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_WHITE, _BLACK, _GREY, _RED = (255, 255, 255), (0, 0, 0), (110, 110, 110), (200, 0, 0)


def write_contact_sheet(index: Index, splits: Sequence[str], path: Path, seed: int) -> None:
    """Writes a PNG of 8 x 8 samples, drawn by `seed` in equal number from each split, one after the other.

    Below each, its class and label, then its split and key; what cannot be decoded is a red cell. UserError for offsets
    that cannot be read, and where the file cannot be written.
    """
    sheet = Image.new("RGB", (COLUMNS * _CELL[0] + _GAP, ROWS * _CELL[1] + _GAP), _WHITE)
    font = ImageFont.load_default(_FONT_SIZE)
    cells = [(split, sample) for split in splits for sample in _drawn(index, split, seed, len(splits))]
    readers = {split: Reader(index, split) for split in splits}
    for number, (split, sample) in enumerate(cells):
        row, column = divmod(number, COLUMNS)
        cell = _cell(readers[split], sample, index.classes, split, font)
        sheet.paste(cell, (_GAP + column * _CELL[0], _GAP + row * _CELL[1]))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    with atomic_file(path) as file:
        file.write(buffer.getvalue())


def _drawn(index: Index, split: str, seed: int, num_splits: int) -> list[int]:
    num_samples = index.split(split).num_samples
    if num_samples == 0:
        return []
    num = min(num_samples, max(1, COLUMNS * ROWS // num_splits))
    return Permutation(num_samples, seed, "contact sheet", split)(np.arange(num)).tolist()


def _cell(reader: Reader, sample: int, classes: Sequence[str], split: str, font: Font) -> Image.Image:
    cell = Image.new("RGB", (_SIDE, _CELL[1]), _WHITE)
    draw = ImageDraw.Draw(cell)
    try:
        thumbnail, label = reader.read(sample, _thumbnail)
        cell.paste(thumbnail, ((_SIDE - thumbnail.width) // 2, (_SIDE - thumbnail.height) // 2))
        text = f"{classes[label]} ({label})"
    except BadSample:
        draw.rectangle((0, 0, _SIDE - 1, _SIDE - 1), fill=_RED)
        text = "unreadable"
    draw.text((0, _SIDE), _fitting(text, font), _BLACK, font)
    draw.text((0, _SIDE + _LINE), _fitting(f"{split}: {reader.key(sample) or f'sample {sample}'}", font), _GREY, font)
    return cell


def _thumbnail(data: bytes) -> Image.Image:
    image = Image.fromarray(decode(data, read_header(data).field))
    return ImageOps.contain(image, (_SIDE, _SIDE))


def _fitting(text: str, font: Font) -> str:
    """The text, cut in its middle where it is wider than a thumbnail."""
    short, kept = text, len(text)
    while font.getlength(short) > _SIDE:
        kept -= 1
        short = f"{text[: kept // 2]}..{text[-(kept - kept // 2) :]}"
    return short
