"""What tools that draw over an image share: the image as evaluation sees it, and the PNG they write."""

import argparse
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.augment.exact import EvalTransform
from shards.durable import atomic_file
from shards.errors import UserError


def place(text: str) -> tuple[int, int]:
    """For argparse: the row and column of a patch."""
    row, _, column = text.partition(",")
    if not (row.isdecimal() and column.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no patch: give its row and column, as in 2,3")
    return int(row), int(column)


def check_output(path: Path) -> None:
    """Raises UserError where no PNG can be written to `path`."""
    if path.suffix.lower() != ".png":
        raise UserError(f"-o {path}: the picture is a PNG; give a name that ends in .png")
    if not path.parent.is_dir():
        raise UserError(f"-o {path}: there is no directory {path.parent}; make it, or give another one")


def read_pixels(path: Path, transform: EvalTransform) -> NDArray[np.uint8]:
    """uint8 [S, S, 3]: the image as evaluation sees it. Raises UserError where it is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a JPEG or PNG")
    try:
        return transform(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: {error}; give a JPEG or PNG") from error


def write(sheet: Image.Image, path: Path) -> None:
    """The picture, whole or not at all; says how large it is."""
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    with atomic_file(path) as file:
        file.write(buffer.getvalue())
    print(f"{path}: {sheet.width} x {sheet.height} pixels")
