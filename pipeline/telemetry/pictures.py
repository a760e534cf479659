"""Pictures for TensorBoard: what the model is trained on, and whom its tokens read from and write to.

Shapes: B samples, C classes, S side of an image.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from pipeline.augment.device import denormalise, normalise
from pipeline.backend import Backend, Mixed
from pipeline.data.batch import Request
from pipeline.data.samples import Samples
from pipeline.models.vittm import ViTTM
from pipeline.models.vittm.attention import LayerAttention, Stream, attention_maps, has_attention, streams
from pipeline.telemetry.attention_picture import Picture, Row, draw

Pixels = NDArray[np.uint8]
Show = Callable[[int, str, Pixels], None]

NUM_SAMPLES, COLUMNS = 16, 4
NUM_IMAGES = 4
_CELL, _LINE, _CHARACTERS = 144, 14, 22  # pixels: the side of a sample, and a line of text; and what fits into it


def no_samples(done: int, mixed: Mixed) -> None:
    """Where pictures are off."""


def no_maps(done: int) -> None:
    """Where pictures are off, or the model has no maps."""


@dataclass(frozen=True)
class AugmentedSamples:
    """Shows "samples": the first of a micro-batch as the model is given them, with their classes, in the first step of
    the run and in those after an evaluation (every `every` steps)."""

    show: Show
    classes: Sequence[str]
    every: int

    def __call__(self, done: int, mixed: Mixed) -> None:
        """mixed: of the step that makes `done` steps."""
        if (done - 1) % self.every:
            return
        images, targets = (tensor[:NUM_SAMPLES].detach().float() for tensor in mixed)
        names = [self._name(shares) for shares in targets.cpu()]
        self.show(done, "samples", sheet(denormalise(images).permute(0, 2, 3, 1).cpu().numpy(), names))

    def _name(self, shares: Tensor) -> str:
        """The classes of a sample; with their shares, in hundredths, where it is mixed or smoothed."""
        found = shares.topk(min(2, len(shares)))
        parts = [(self.classes[label], share) for share, label in zip(*map(Tensor.tolist, found), strict=True)]
        parts = [(name, share) for name, share in parts if round(share, 2)]
        return "\n".join(name if share == 1 else f"{share:.2f} {name}" for name, share in parts)


def sheet(images: Pixels, names: Sequence[str]) -> Pixels:
    """Images uint8 [B, S, S, 3] side by side, with their names of up to two lines below them."""
    rows, height = -(-len(images) // COLUMNS), _CELL + 2 * _LINE + 4
    canvas = Image.new("RGB", (COLUMNS * (_CELL + 4), rows * height), "white")
    for number, (pixels, name) in enumerate(zip(images, names, strict=True)):
        x, y = number % COLUMNS * (_CELL + 4), number // COLUMNS * height
        canvas.paste(Image.fromarray(pixels).resize((_CELL, _CELL), Image.Resampling.NEAREST), (x, y))
        lines = "\n".join(line[:_CHARACTERS] for line in name.split("\n"))
        ImageDraw.Draw(canvas).multiline_text((x, y + _CELL), lines, "black", ImageFont.load_default(11), spacing=2)
    return np.asarray(canvas)


@dataclass(frozen=True)
class AttentionMaps:
    """Shows "attention/read" and "attention/write" of the first validation images: for the token in the middle which
    tokens of the other stream it takes from, block by block.

    The ranks run the same forward pass together, as evaluation does, so that sharded models gather a layer at a time,
    as ever: nothing is gathered for this.
    """

    show: Show
    backend: Backend
    samples: Samples
    _pixels: list[Pixels] = field(default_factory=list)

    def __call__(self, done: int) -> None:
        """Of the weights after `done` steps; every rank calls it."""
        model, pixels = self.backend.module, self._images()
        assert isinstance(model, ViTTM)
        images = normalise(torch.from_numpy(pixels).to(self.backend.world.device).permute(0, 3, 1, 2))
        with evaluating(model), self.backend.autocast():
            layers = attention_maps(model, images)
        if not self.backend.world.is_main:
            return
        memory, process = streams(model, images.shape[-2:])
        read, write = _stack(layers, "read"), _stack(layers, "write")
        self.show(done, "attention/read", maps(pixels, read, process, memory))
        if process.placed and write.shape[2] == memory.size:  # else there is no place in the image for either
            self.show(done, "attention/write", maps(pixels, write, memory, process))

    def _images(self) -> Pixels:
        """uint8 [B, S, S, 3], the same on every rank."""
        if not self._pixels:
            side, number = self.samples.transform.image_size, min(NUM_IMAGES, len(self.samples.reader))
            self._pixels.append(np.empty((number, side, side, 3), dtype=np.uint8))
            self.samples.fill(Request(np.arange(number), 0, 0, 0), self._pixels[0])
        return self._pixels[0]


def has_maps(model: nn.Module) -> bool:
    return isinstance(model, ViTTM) and has_attention(model)


def maps(pixels: Pixels, weights: NDArray, asking: Stream, asked: Stream) -> Pixels:
    """A sheet for each image, one below the other. weights: [blocks, B, tokens that ask, tokens that are asked], means
    over the heads."""
    rows, columns = asking.grid
    place, blocks = (rows // 2, columns // 2), range(len(weights))
    title = f"What the middle {asking.one} takes from each {asked.one}"
    drawn = []
    for image, of_image in zip(pixels, weights[:, :, place[0] * columns + place[1]].swapaxes(0, 1), strict=True):
        row = Row(place, of_image.reshape(-1, *asked.grid))
        drawn.append(np.asarray(draw(Picture(title, [], image, asking.grid if asking.placed else None, blocks, [row]))))
    return np.concatenate(drawn)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, the model is in eval mode."""
    model.eval()
    try:
        yield
    finally:
        model.train()


def _stack(layers: Sequence[LayerAttention], name: str) -> NDArray:
    """[blocks, B, tokens that ask, tokens that are asked]."""
    return torch.stack([getattr(layer, name).float().mean(dim=1) for layer in layers]).cpu().numpy()
