"""Read and write attention over an image: `python tools/show_attention.py RUN/weights/ema.safetensors IMAGE -o PNG`.

A row of the picture is a process patch, a column a block: which memory patches the patch reads there. `--write` turns
it round: which process patches a memory patch takes from.

Exit code 0: the picture is written; 2: it cannot be made, and why.
"""

import argparse
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment.device import normalise
from pipeline.augment.exact import EvalTransform
from pipeline.models.vittm import ViTTM
from pipeline.models.vittm.attention import Stream, attention_maps, head_type, streams
from pipeline.predict import Trained, load_run
from pipeline.telemetry.attention_picture import Grid, Picture, Row, draw
from shards.errors import UserError
from tools.pictures import check_output, place, read_pixels, write


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
        description="Draw which memory patches a process patch reads, block by block, over an image.",
        epilog="Exit code: 0 the picture is written; 2 it cannot be made.",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN/weights/ema.safetensors or model.safetensors, or RUN")
    add("image", type=Path, metavar="IMAGE", help="a JPEG or PNG; it is resized and cropped as in evaluation")
    add("-o", "--output", type=Path, required=True, metavar="PNG", help="the picture")
    patches = "patches that ask, from 0,0 (default: five around the middle)"
    add("--patches", type=place, nargs="+", metavar="ROW,COLUMN", help=patches)
    add("--blocks", type=int, nargs="+", metavar="N", help="blocks, from 0 (default: all)")
    add("--head", type=int, metavar="H", help="one attention head, from 0 (default: the mean over all)")
    add("--write", action="store_true", help="memory patches ask, and take from process patches")
    return parser


def _show(arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    run = load_run(arguments.checkpoint)
    model = _vittm(run)
    pixels = read_pixels(arguments.image, EvalTransform.of(run.recipe))
    write(draw(_picture(arguments, run, model, pixels)), arguments.output)


def _vittm(run: Trained) -> ViTTM:
    if not isinstance(run.model, ViTTM):
        raise UserError(
            f"{run.weights} is of model.name '{run.recipe.model.name}', which has no memory to read from or write to: "
            "give a run of a ViTTM (vittm_* or deittm_*)"
        )
    return run.model


def _picture(arguments: argparse.Namespace, run: Trained, model: ViTTM, pixels: NDArray[np.uint8]) -> Picture:
    asking, asked = _streams(model, pixels, arguments.write)
    places = arguments.patches or _spread(asking.grid)
    blocks = list(range(len(model.layers))) if arguments.blocks is None else arguments.blocks
    _check_places(places, asking)
    _check_blocks(blocks, len(model.layers))
    weights = _weights(model, pixels, arguments.write, arguments.head)
    _check_tokens(weights, asking)
    maps = weights[blocks].unflatten(2, asked.grid).unflatten(1, asking.grid).numpy()
    rows = [Row(place, maps[:, place[0], place[1]]) for place in places]
    title = f"What a {asking.one} {'takes' if arguments.write else 'reads'} from each {asked.one}"
    heads = "mean over all heads" if arguments.head is None else f"head {arguments.head}"
    notes = [
        f"{run.weights}: {run.recipe.model.name}, {head_type(model)}, {heads}. Image: {arguments.image}",
        "Below each map: the largest share in it; in brackets, how many times an even share "
        f"({1 / prod(asked.grid):.1%}) that is: a flat map has 1.0x.",
    ]
    return Picture(title, notes, pixels, asking.grid if asking.placed else None, blocks, rows)


def _streams(model: ViTTM, pixels: NDArray[np.uint8], write: bool) -> tuple[Stream, Stream]:
    """Who asks, and who is asked. Raises UserError where the latter is no part of the image."""
    memory, process = streams(model, pixels.shape[:2])
    if write and not process.placed:
        raise UserError(
            "--write: process tokens of process_embedder_type 'latent' are learned vectors, which have no place in the "
            "image: leave --write out, to see what they read"
        )
    return (memory, process) if write else (process, memory)


def _spread(grid: Grid) -> list[Grid]:
    """The middle of a grid, and of its quarters; fewer where it is small."""
    (top, middle, bottom), (left, centre, right) = ([round((side - 1) * at / 4) for at in (1, 2, 3)] for side in grid)
    return sorted({(top, left), (top, right), (middle, centre), (bottom, left), (bottom, right)})


def _check_places(places: Sequence[Grid], asking: Stream) -> None:
    rows, columns = asking.grid
    for row, column in places:
        if row >= rows or column >= columns:
            raise UserError(
                f"--patches {row},{column}: {asking.name} tokens are {rows}x{columns}; give rows from 0 to {rows - 1} "
                f"and columns from 0 to {columns - 1}"
            )


def _check_blocks(blocks: Sequence[int], depth: int) -> None:
    for block in blocks:
        if not 0 <= block < depth:
            raise UserError(f"--blocks {block}: the model has {depth} blocks; give numbers from 0 to {depth - 1}")


def _weights(model: ViTTM, pixels: NDArray[np.uint8], write: bool, head: int | None) -> Tensor:
    """Of all blocks: (blocks, tokens that ask, tokens that are asked)."""
    images = normalise(torch.from_numpy(pixels.copy()).permute(2, 0, 1).unsqueeze(0))
    layers = attention_maps(model, images)
    weights = torch.stack([(layer.write if write else layer.read)[0] for layer in layers])  # (blocks, H, M, N)
    if head is None:
        return weights.mean(dim=1)
    num_heads = weights.shape[1]
    if not 0 <= head < num_heads:
        raise UserError(
            f"--head {head}: the model reads and writes with {num_heads} heads; give one from 0 to {num_heads - 1}, or "
            "none, for their mean"
        )
    return weights[:, head]


def _check_tokens(weights: Tensor, asking: Stream) -> None:
    """Whether the tokens that ask are the patches of their grid: conv memory blocks merge them before the write."""
    if weights.shape[1] != prod(asking.grid):
        raise UserError(
            f"--write: memory_blocks 'conv' merges the {prod(asking.grid)} memory patches into {weights.shape[1]} "
            "tokens before the write, and these have no place in the image: leave --write out, to see what is read"
        )


if __name__ == "__main__":
    sys.exit(main())
