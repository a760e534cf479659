"""Pictures that a run showed in TensorBoard: samples as the model was given them, and its attention."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import (
    COMPRESSED_HISTOGRAMS,
    IMAGES,
    SCALARS,
    EventAccumulator,
)

from pipeline.report.images import smaller

BOARD = "tensorboard"
TITLES = {
    "samples": "Samples as the model was given them",
    "attention/read": "What it reads",
    "attention/write": "What it writes",
}
"""By the names that pipeline.telemetry.pictures gives them."""


@dataclass(frozen=True)
class Shown:
    title: str
    step: int
    uri: str


def shown(run_dir: Path) -> list[Shown]:
    """The last one of each name, in the order of TITLES."""
    return list(_shown(run_dir))


def _shown(run_dir: Path) -> Iterator[Shown]:
    left = dict(TITLES)
    found = {}
    for file in sorted((run_dir / BOARD).glob("events.out.tfevents.*"), reverse=True):  # the newest attempt first
        events = EventAccumulator(str(file), {IMAGES: 1, SCALARS: 1, COMPRESSED_HISTOGRAMS: 1}).Reload()
        for name in left.keys() & events.Tags()["images"]:
            last = events.Images(name)[-1]
            found[name] = Shown(left.pop(name), last.step, smaller(last.encoded_image_string))
        if "samples" in found:  # a model without attention never shows the others
            break
    yield from (found[name] for name in TITLES if name in found)
