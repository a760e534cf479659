"""Validation images that a trained model gets most wrong. Shapes: B samples, C classes, S side of an image."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from pipeline.augment.device import normalise
from pipeline.augment.exact import EvalTransform
from pipeline.predict import load_run
from pipeline.record import CLASSES, read_classes, weights_path
from pipeline.report.images import data_uri
from shards.errors import UserError
from shards.index import Index
from shards.reader import BadSample, Reader
from shards.store import StoreOptions, open_data

NUM_SHOWN, MAX_IMAGES, MAX_SECONDS, BATCH = 12, 512, 5.0, 32
WEIGHTS = ("ema", "model", "best_ema", "best_model")


@dataclass(frozen=True)
class Mistake:
    uri: str
    label: str
    predicted: str
    probability: float
    of_label: float
    sample: int


@dataclass(frozen=True)
class Mistakes:
    """The worst of `num_wrong` mistakes in `num_seen` of a split's images, by the probability that is given to the
    label."""

    worst: tuple[Mistake, ...]
    num_wrong: int
    num_seen: int
    num_images: int
    split: str
    weights: str


@dataclass(frozen=True)
class _Seen:
    pixels: NDArray[np.uint8]
    sample: int
    label: int
    predicted: int
    probability: float
    of_label: float


def worst_mistakes(run_dir: Path) -> Mistakes:
    """Of the first MAX_IMAGES of the split that the run evaluates on, or as many as MAX_SECONDS are enough for.

    Raises UserError (StoreError) where there are no weights yet, or the data is not to be had from here.
    """
    paths = [weights_path(run_dir, name) for name in WEIGHTS]
    run = load_run(next((path for path in paths if path.is_file()), run_dir))
    data = run.recipe.data
    index, store = open_data(data.path, StoreOptions(data.remote, data.cache, data.cache_size))
    with closing(store):
        _check_classes(read_classes(run_dir), index)
        reader = Reader(index, data.val, store)
        seen = list(_seen(run.model, reader, EvalTransform.of(run.recipe)))
    wrong = sorted((one for one in seen if one.label != one.predicted), key=lambda one: one.of_label)
    worst = tuple(_mistake(one, index.classes) for one in wrong[:NUM_SHOWN])
    return Mistakes(worst, len(wrong), len(seen), len(reader), data.val, run.weights.name)


def _check_classes(known: tuple[str, ...] | None, index: Index) -> None:
    """Raises UserError where other data lies where the run's did: its labels would be judged by other names."""
    if known not in (None, index.classes):
        raise UserError(
            f"the data in {index.root} has other classes than the run was trained on, which are in its {CLASSES}: put "
            "that data back"
        )


def _seen(model: nn.Module, reader: Reader, transform: EvalTransform) -> Iterator[_Seen]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    samples, until = range(min(MAX_IMAGES, len(reader))), time.monotonic() + MAX_SECONDS
    for start in samples[::BATCH]:
        if time.monotonic() > until:
            return
        if read := list(_read(reader, transform, samples[start : start + BATCH])):
            yield from _judged(model, read, device)


def _read(
    reader: Reader, transform: EvalTransform, samples: Sequence[int]
) -> Iterator[tuple[int, NDArray[np.uint8], int]]:
    """(id, pixels [S, S, 3], label) of those that can be read; the run's quarantine names the others."""
    for sample in samples:
        with suppress(BadSample):
            yield sample, *reader.read(sample, transform)


@torch.no_grad()
def _judged(
    model: nn.Module, read: Sequence[tuple[int, NDArray[np.uint8], int]], device: torch.device
) -> Iterator[_Seen]:
    pixels = np.stack([image for _, image, _ in read])
    logits = model(normalise(torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)))
    shares = F.softmax(logits.float(), dim=1).cpu()  # [B, C]
    for (sample, image, label), of_classes in zip(read, shares, strict=True):
        predicted = int(of_classes.argmax())
        yield _Seen(image, sample, label, predicted, of_classes[predicted].item(), of_classes[label].item())


def _mistake(seen: _Seen, classes: Sequence[str]) -> Mistake:
    names = classes[seen.label], classes[seen.predicted]
    return Mistake(data_uri(seen.pixels), *names, seen.probability, seen.of_label, seen.sample)
