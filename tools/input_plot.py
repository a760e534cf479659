"""The rates of tools/bench_input.py as a PNG: a panel for each size of images and augmentation."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tools.input_figures import DECODE_ONLY

WIDTH, ROW, LEFT, RIGHT, MARGIN = 520, 24, 150, 70, 16  # pixels: a panel, a bar with its gap, names, numbers
BLACK, OURS, OTHERS, LINE = "#222222", "#1f6fb2", "#b8bec6", "#d95f02"

Loaders = Mapping[str, Mapping[str, float]]


def draw_rates(summary: Mapping[str, Mapping[str, Loaders]], path: Path) -> None:
    """Writes `path`; sizes stand beside each other, augmentations one below the other."""
    augments = list(dict.fromkeys(augment for panels in summary.values() for augment in panels))
    heights = [max(_height(panels.get(augment, {})) for panels in summary.values()) for augment in augments]
    image = Image.new("RGB", (len(summary) * WIDTH, sum(heights) + 2 * MARGIN), "white")
    for (column, (size, panels)), (row, augment) in product(enumerate(summary.items()), enumerate(augments)):
        corner = (column * WIDTH + MARGIN, sum(heights[:row]) + MARGIN)
        ImageDraw.Draw(image).text(corner, f"{size}, {augment}: images a CPU-second", BLACK, ImageFont.load_default(16))
        widest = max(numbers["highest"] for loaders in panels.values() for numbers in loaders.values())
        _draw_bars(ImageDraw.Draw(image), corner, panels.get(augment, {}), (WIDTH - LEFT - RIGHT - 2 * MARGIN) / widest)
    image.quantize(64).save(path, optimize=True)


def _height(loaders: Loaders) -> int:
    return ROW * (len(loaders) + 2)


def _draw_bars(draw: ImageDraw.ImageDraw, corner: tuple[int, int], loaders: Loaders, scale: float) -> None:
    """From the fastest down, with a line from the lowest to the highest round; `scale`: pixels an image a second."""
    font, left, y = ImageFont.load_default(14), corner[0] + LEFT, corner[1]
    for name, numbers in sorted(loaders.items(), key=lambda item: -item[1]["cpu"]):
        y += ROW
        colour = LINE if name == DECODE_ONLY else OURS if name.startswith("ours") else OTHERS
        ends = [left + numbers[key] * scale for key in ("cpu", "lowest", "highest")]
        draw.text((left - 6, y + ROW // 2), name, BLACK, font, anchor="rm")
        draw.rectangle((left, y + 4, ends[0], y + ROW - 4), colour)
        draw.line((ends[1], y + ROW // 2, ends[2], y + ROW // 2), BLACK)
        draw.text((ends[2] + 6, y + ROW // 2), f"{numbers['cpu']:,.0f}", BLACK, font, anchor="lm")
