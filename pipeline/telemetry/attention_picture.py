"""Attention as a picture: a row for each token that asks, a column for each block, of maps that lie over the image.

Shapes: S side of the square image in pixels; a grid is (rows, columns) of patches.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Grid = tuple[int, int]
Corner = tuple[int, int]

CELL = 168  # pixels: the side of a map; 2, 3, 4, 6, 7, 8, 12, 14, 21, 24 and 28 patches are whole pixels there
BLOCKS_A_BAND = 12
GAP, MARGIN, LINE = 10, 20, 20
LEFT = MARGIN + CELL + 2 * GAP  # of the first map, in a band
_LEAST_WIDTH = 640
_CHARACTER = 7  # pixels, about, of a note's
_BLACK, _GREY, _MARK = "#1a1a1a", "#666666", "#00e5ff"
_INFERNO = cv2.applyColorMap(np.arange(256, dtype=np.uint8), cv2.COLORMAP_INFERNO).reshape(256, 3)[:, ::-1]
_IMAGE = 0.45  # brightness of the image under a map, which must not outshine the colours
_OPACITY = (0.4, 0.95)  # of the colours: of nothing, and of the largest share


@dataclass(frozen=True)
class Row:
    """A token that asks, by its place in their grid; maps float [blocks, rows, columns] are shares of what it gets."""

    place: Grid
    maps: NDArray[np.floating]


@dataclass(frozen=True)
class Picture:
    """`pixels` uint8 [S, S, 3] are the image as the model saw it. `grid` is that of the tokens that ask, or None where
    they are no patches of it."""

    title: str
    notes: Sequence[str]
    pixels: NDArray[np.uint8]
    grid: Grid | None
    blocks: Sequence[int]
    rows: Sequence[Row]


def draw(picture: Picture) -> Image.Image:
    """Blocks stand side by side up to twelve; the next twelve are a band of their own below."""
    bands = [range(len(picture.blocks))[i:][:BLOCKS_A_BAND] for i in range(0, len(picture.blocks), BLOCKS_A_BAND)]
    width = max(_LEAST_WIDTH, LEFT + len(bands[0]) * (CELL + GAP) - GAP + MARGIN)
    notes = [line for note in picture.notes for line in textwrap.wrap(note, (width - 2 * MARGIN) // _CHARACTER)]
    top = MARGIN + LINE * (len(notes) + 3)
    height = LINE + len(picture.rows) * (CELL + LINE + GAP) + GAP
    sheet = Image.new("RGB", (width, top + len(bands) * height), "white")
    _draw_head(sheet, picture.title, notes)
    for number, band in enumerate(bands):
        _draw_band(sheet, picture, band, top + number * height)
    return sheet


def _draw_head(sheet: Image.Image, title: str, notes: Sequence[str]) -> None:
    """Title, notes and the scale of colours, a line each."""
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    canvas.text((MARGIN, MARGIN - 4), title, _BLACK, ImageFont.load_default(18))
    for number, line in enumerate(notes, start=1):
        canvas.text((MARGIN, MARGIN + number * LINE + 4), line, _GREY, font)
    y = MARGIN + (len(notes) + 1) * LINE + 4
    scale = heat(Image.new("RGB", (CELL, LINE - 6), "#808080"), np.linspace(0, 1, CELL)[None])
    sheet.paste(scale, (MARGIN, y + 2))
    canvas.text((MARGIN + CELL + GAP, y), "from nothing to the largest share in the map", _GREY, font)


def _draw_band(sheet: Image.Image, picture: Picture, band: range, top: int) -> None:
    """The image with its patches, and the maps of some blocks, below the blocks' numbers."""
    image = Image.fromarray(picture.pixels).resize((CELL, CELL), Image.Resampling.BICUBIC)
    columns = [LEFT + column * (CELL + GAP) for column in range(len(band))]
    for x, block in zip(columns, band, strict=True):
        _caption(sheet, (x, top), f"block {picture.blocks[block]}", _BLACK)
    for number, row in enumerate(picture.rows):
        y = top + LINE + number * (CELL + LINE + GAP)
        _draw_asking(sheet, (MARGIN, y), image, picture, row)
        for x, block in zip(columns, band, strict=True):
            shares = row.maps[block]
            sheet.paste(heat(image, shares), (x, y))
            _mark(sheet, (x, y), row.place, picture.grid, width=2)
            _caption(sheet, (x, y + CELL), f"max {shares.max():.1%} ({shares.max() * shares.size:.1f}x)", _GREY)


def _draw_asking(sheet: Image.Image, corner: Corner, image: Image.Image, picture: Picture, row: Row) -> None:
    """The image with all patches that ask, and the row's own marked."""
    sheet.paste(image, corner)
    for other in picture.rows:
        _mark(sheet, corner, other.place, picture.grid, width=1)
    _mark(sheet, corner, row.place, picture.grid, width=3)
    name = f"patch {row.place[0]},{row.place[1]}" if picture.grid else f"token {row.place[1]}"
    _caption(sheet, (corner[0], corner[1] + CELL), name, _BLACK)


def heat(image: Image.Image, shares: NDArray[np.floating]) -> Image.Image:
    """The image, grey and dimmed, under colours (inferno, whose lightness grows evenly) for shares [rows, columns].

    A share colours its whole patch: smoother edges would be invented.
    """
    level = Image.fromarray((shares / shares.max()).astype(np.float32))
    filled = np.asarray(level.resize(image.size, Image.Resampling.NEAREST))[..., None]
    grey = np.asarray(image.convert("L"))[..., None] * _IMAGE
    opacity = _OPACITY[0] + (_OPACITY[1] - _OPACITY[0]) * filled
    colours = _INFERNO[(filled[..., 0] * 255).round().astype(np.uint8)]
    return Image.fromarray((grey * (1 - opacity) + colours * opacity).round().astype(np.uint8))


def _mark(sheet: Image.Image, corner: Corner, place: Grid, grid: Grid | None, width: int) -> None:
    """A frame with a dark edge round a patch of the cell at `corner`; outside it, so that nothing in it is hidden."""
    if grid is None:
        return
    (x, y), (row, column), (rows, columns) = corner, place, grid
    left, right = (x + edge * CELL // columns for edge in (column, column + 1))
    top, bottom = (y + edge * CELL // rows for edge in (row, row + 1))
    for reach, colour in ((width + 1, _BLACK), (width, _MARK)):
        box = (left - reach, top - reach, right - 1 + reach, bottom - 1 + reach)
        ImageDraw.Draw(sheet).rectangle(box, outline=colour, width=reach)


def _caption(sheet: Image.Image, corner: Corner, text: str, colour: str) -> None:
    """A line centred over the width of a cell."""
    middle = (corner[0] + CELL // 2, corner[1] + LINE // 2)
    ImageDraw.Draw(sheet).text(middle, text, colour, ImageFont.load_default(13), anchor="mm")
