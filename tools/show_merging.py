"""Which tokens LTM merged: `python tools/show_merging.py RUN/weights/ema.safetensors IMAGE -o PNG`.

A column of the picture is a merged token: above, the image with a red box on a token of it; below, the weights of all
the tokens that merged into it, of which the one in the box has the largest, or was asked for by `--patches`. The
columns are the merged tokens of most tokens; the block is the first. In a ViT, whose tokens stay merged, the weights of
a later block are the products with those of the blocks before it.

Exit code 0: the picture is written; 2: it cannot be made, and why.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.augment.device import normalise
from pipeline.augment.exact import EvalTransform
from pipeline.models.ltm import LTM
from pipeline.models.ltm.maps import merged_on, num_maps
from pipeline.predict import Trained, load_run
from pipeline.telemetry.attention_picture import CELL, GAP, LINE, MARGIN, Grid, heat
from shards.errors import UserError
from tools.pictures import check_output, place, read_pixels, write

COLUMNS = 4
RED, GREY = "#ff0000", "#666666"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        _show(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Draw which tokens an LTM block merged into one, and by what weights, over an image.",
        epilog="Exit code: 0 the picture is written; 2 it cannot be made.",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN/weights/ema.safetensors or model.safetensors, or RUN")
    add("image", type=Path, metavar="IMAGE", help="a JPEG or PNG; it is resized and cropped as in evaluation")
    add("-o", "--output", type=Path, required=True, metavar="PNG", help="the picture")
    targets = f"tokens of the block's map, from 0,0 (default: of the {COLUMNS} merged tokens of most tokens)"
    add("--patches", type=place, nargs="+", metavar="ROW,COLUMN", help=targets)
    add("--block", type=int, default=0, metavar="N", help="a block, from 0 (default: the first)")
    return parser


def _show(arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    run = load_run(arguments.checkpoint)
    pixels = read_pixels(arguments.image, EvalTransform.of(run.recipe))
    targets, weights = _merged(_ltm(run), pixels, arguments.block)
    places = arguments.patches or _largest(targets, weights)
    _check_places(places, targets)
    notes = (
        f"Tokens in red boxes, and the weights of all tokens that merged into one with them. {run.weights}: "
        f"{run.recipe.model.name}, block {arguments.block}. Image: {arguments.image}"
    )
    write(_draw(pixels, targets, weights, places, notes), arguments.output)


def _ltm(run: Trained) -> LTM:
    if not isinstance(run.model, LTM) or not run.model.chains():
        raise UserError(
            f"{run.weights} is of model.name '{run.recipe.model.name}', which merges no tokens: give a run of an "
            "ltm_* model of a compression_ratio below 1"
        )
    return run.model


@torch.no_grad()
def _merged(model: LTM, pixels: NDArray[np.uint8], block: int) -> tuple[NDArray, NDArray]:
    """Of every place of the block's map, the merged token that it went into, and its weight there."""
    model(normalise(torch.from_numpy(pixels.copy()).permute(2, 0, 1).unsqueeze(0)))
    depth = num_maps(model)
    if not 0 <= block < depth:
        raise UserError(f"--block {block}: the model has {depth} blocks; give a number from 0 to {depth - 1}")
    targets, weights = merged_on(model, block)
    return targets.numpy(), weights.numpy()


def _largest(targets: NDArray, weights: NDArray) -> list[Grid]:
    """The token of the largest weight in each of the merged tokens that have most tokens."""
    numbers, sizes = np.unique(targets, return_counts=True)
    chosen = numbers[np.argsort(-sizes, kind="stable")[:COLUMNS]]
    flat = [int(np.where(targets == number, weights, -1).argmax()) for number in chosen]
    return [divmod(position, targets.shape[1]) for position in flat]


def _check_places(places: Sequence[Grid], targets: NDArray) -> None:
    rows, columns = targets.shape
    for row, column in places:
        if row >= rows or column >= columns:
            raise UserError(
                f"--patches {row},{column}: the block's tokens are {rows}x{columns}; give rows from 0 to {rows - 1} "
                f"and columns from 0 to {columns - 1}"
            )


def _draw(
    pixels: NDArray[np.uint8], targets: NDArray, weights: NDArray, places: Sequence[Grid], notes: str
) -> Image.Image:
    """The columns side by side, below the notes."""
    width = 2 * MARGIN + max(COLUMNS, len(places)) * (CELL + GAP) - GAP
    lines = textwrap.wrap(notes, (width - 2 * MARGIN) // 7)
    top = MARGIN + LINE * len(lines) + GAP
    sheet = Image.new("RGB", (width, top + 2 * (CELL + GAP) + LINE + MARGIN), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, line in enumerate(lines):
        canvas.text((MARGIN, MARGIN + number * LINE), line, GREY, font)
    image = Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.BICUBIC)
    for column, token in enumerate(places):
        shares = np.where(targets == targets[token], weights, 0)
        _draw_column(sheet, (MARGIN + column * (CELL + GAP), top), image, token, shares)
    return sheet


def _draw_column(sheet: Image.Image, corner: Grid, image: Image.Image, token: Grid, shares: NDArray) -> None:
    """A token in its red box, the weights of what merged with it, and a caption."""
    canvas, below = ImageDraw.Draw(sheet), (corner[0], corner[1] + CELL + GAP)
    sheet.paste(image, corner)
    _box(canvas, corner, token, shares.shape)
    sheet.paste(heat(image, shares), below)
    caption = f"{token[0]},{token[1]}: {np.count_nonzero(shares)} tokens, max {shares.max():.0%}"
    middle = below[0] + CELL // 2, below[1] + CELL + LINE // 2
    canvas.text(middle, caption, GREY, ImageFont.load_default(13), anchor="mm")


def _box(canvas: ImageDraw.ImageDraw, corner: Grid, token: Grid, grid: Grid) -> None:
    """A red box round the token of a cell, which is not hidden."""
    left, right = (corner[0] + edge * CELL // grid[1] for edge in (token[1], token[1] + 1))
    top, bottom = (corner[1] + edge * CELL // grid[0] for edge in (token[0], token[0] + 1))
    canvas.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline=RED, width=2)


if __name__ == "__main__":
    sys.exit(main())
