"""Draw the demo's images: python tools/make_demo_data.py OUT. No download; the same seed gives the same bytes.

OUT/formula/{train,val}/<class>/: glyphs drawn by formula, to pretrain on. A class is a skeleton of one to four random
Bezier strokes; an image is a jittered rendering of it. No digit and no alphabet is used.

OUT/digits/{train,val}/<0..9>/: the 1,797 handwritten digits that scikit-learn ships (UCI optical recognition), to
fine-tune on. The 2nd, 5th, 8th ... image of each class is held out as val: 599 of 1,797. They are images that training
never sees, but the same 13 people wrote both parts, so the figure says nothing about a writer not seen.

OUT/digits/few{0,1,2}/<0..9>/: 10 images a class drawn from digits/train, by the seeds 0, 1 and 2 (whatever --seed is).

The digits are counts of ink on an 8 x 8 grid. Glyphs are measured on the same grid, and both are enlarged to --size.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from shards.errors import UserError

GRID = 8  # cells a side of the grid on which ink is measured
CANVAS = 128  # pixels a side of the drawing, before it is measured
CURVE_POINTS = np.linspace(0, 1, 20)
MARKER = "demo.json"
NUM_FEW_SETS = 3
FEW_PER_CLASS = 10


@dataclass(frozen=True)
class Options:
    """What the images depend on; the marker file holds it."""

    classes: int = 96
    per_class: int = 100
    size: int = 32
    seed: int = 0

    def validate(self) -> None:
        for name, value, lowest in (
            ("classes", self.classes, 2),
            ("per-class", self.per_class, 1),
            ("size", self.size, GRID),
            ("seed", self.seed, 0),
        ):
            if value < lowest:
                raise UserError(f"--{name} is {value}, and must be at least {lowest}")


# --- glyphs; a skeleton is float [strokes, 4, 2]: the control points (x, y) of cubic Bezier curves, in -1 to 1


def draw_skeleton(generator: np.random.Generator) -> np.ndarray:
    """One to four strokes; half of them start where the last one ended, and a quarter close into a loop."""
    strokes = generator.uniform(-1, 1, (generator.integers(1, 5), 4, 2))
    for i in range(len(strokes)):
        if i and generator.random() < 0.5:
            strokes[i, 0] = strokes[i - 1, 3]
        if generator.random() < 0.25:
            strokes[i, 3] = strokes[i, 0]
    return _fit(strokes)


def _fit(strokes: np.ndarray) -> np.ndarray:
    """Centred and scaled so that the curves' longer extent fills -1 to 1."""
    points = bezier(strokes).reshape(-1, 2)
    low, high = points.min(axis=0), points.max(axis=0)
    return (strokes - (low + high) / 2) / ((high - low).max() / 2)


def bezier(strokes: np.ndarray) -> np.ndarray:
    """Control points [strokes, 4, 2] -> points on the cubic curves [strokes, CURVE_POINTS, 2]."""
    t = CURVE_POINTS[:, None]
    weights = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)
    return weights @ strokes


def jitter(strokes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Another hand: control points moved, then slant, stretch, turn and shift."""
    strokes = _fit(strokes + generator.normal(0, 0.08, strokes.shape))
    turn, slant = generator.normal(0, 0.12), generator.normal(0, 0.15)
    stretch = np.diag(generator.uniform(0.7, 0.95, 2))
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    affine = rotation @ np.array([[1, slant], [0, 1]]) @ stretch
    return strokes @ affine.T + generator.uniform(-0.08, 0.08, 2)


def render(strokes: np.ndarray, pen: float, contrast: float) -> np.ndarray:
    """Strokes -> ink float [GRID, GRID] in 0 to 1; `pen` is the line's width as a share of the side."""
    canvas = Image.new("L", (CANVAS, CANVAS))
    drawing, width = ImageDraw.Draw(canvas), round(pen * CANVAS)
    for curve in (bezier(strokes) + 1) * (CANVAS / 2):
        drawing.line([tuple(point) for point in curve.tolist()], fill=255, width=width, joint="curve")
        for x, y in (curve[0], curve[-1]):
            drawing.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=255)
    return np.asarray(canvas.resize((GRID, GRID), Image.Resampling.BOX)) * (contrast / 255)


def draw_glyph(skeleton: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One image of a class: ink float [GRID, GRID]."""
    return render(jitter(skeleton, generator), generator.uniform(0.1, 0.2), generator.uniform(0.7, 1.0))


# --- class folders


def save(ink: np.ndarray, path: Path, size: int) -> None:
    """Ink float [GRID, GRID] in 0 to 1 -> a grey JPEG of `size` x `size` pixels, ink white."""
    grey = Image.fromarray(np.rint(ink * 255).astype(np.uint8))
    grey.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=92)


def write_folder(folder: Path, inks: Iterable[np.ndarray], size: int) -> None:
    folder.mkdir(parents=True)
    for i, ink in enumerate(inks):
        save(ink, folder / f"{i:05d}.jpg", size)


def write_formula(out: Path, options: Options) -> None:
    """The glyphs: `per_class` images a class to train, a tenth of that (at least one) as val."""
    counts = {"train": options.per_class, "val": max(1, options.per_class // 10)}
    for label in range(options.classes):
        skeleton_seed, *split_seeds = np.random.SeedSequence([options.seed, label]).spawn(1 + len(counts))
        skeleton = draw_skeleton(np.random.default_rng(skeleton_seed))
        for (split, count), split_seed in zip(counts.items(), split_seeds, strict=True):
            generator = np.random.default_rng(split_seed)
            inks = (draw_glyph(skeleton, generator) for _ in range(count))
            write_folder(out / split / f"glyph{label:04d}", inks, options.size)


def write_digits(out: Path, size: int) -> None:
    """scikit-learn's digits as train, val and the few-label sets."""
    digits = load_digits()
    for label in range(10):
        inks = digits.images[digits.target == label] / 16
        train, val = np.delete(inks, np.s_[1::3], axis=0), inks[1::3]
        write_folder(out / "train" / str(label), train, size)
        write_folder(out / "val" / str(label), val, size)
        for few_seed in range(NUM_FEW_SETS):
            chosen = np.random.default_rng([few_seed, label]).choice(len(train), FEW_PER_CLASS, replace=False)
            write_folder(out / f"few{few_seed}" / str(label), train[np.sort(chosen)], size)


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def make(out: Path, options: Options) -> bool:
    """Writes everything beside `out`, marker included, then renames; False when `out` already holds just that.

    Raises UserError when an option is out of range, or when `out` holds anything else.
    """
    options.validate()
    out = out.resolve()
    if (out / MARKER).is_file():
        found = json.loads((out / MARKER).read_text())
        if found == asdict(options):
            return False
        raise UserError(f"{out} holds demo data of other options ({found}, asked: {asdict(options)}); remove it first")
    if out.exists() and not _is_empty_directory(out):
        raise UserError(f"{out} exists and is no demo data (no {MARKER} in it); choose another directory or remove it")
    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was interrupted
    write_formula(partial / "formula", options)
    write_digits(partial / "digits", options.size)
    (partial / MARKER).write_text(json.dumps(asdict(options)) + "\n")
    os.rename(partial, out)
    return True


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done or already there, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to make")
    parser.add_argument("--classes", type=int, default=Options.classes, help="glyph classes (%(default)s)")
    parser.add_argument("--per-class", type=int, default=Options.per_class, help="training glyphs each (%(default)s)")
    parser.add_argument("--size", type=int, default=Options.size, help="side of the images, pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=Options.seed, help="of the glyphs (%(default)s)")
    arguments = vars(parser.parse_args(argv))
    out = arguments.pop("out")
    try:
        written = make(out, Options(**arguments))
    except UserError as error:
        print(f"make_demo_data: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {'written' if written else 'already complete'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
