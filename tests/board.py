"""What a run showed in TensorBoard."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


class Board:
    """The curves and pictures of a run directory, by name."""

    def __init__(self, run_dir: Path) -> None:
        self._events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
        self._events.Reload()

    def names(self) -> set[str]:
        return {*self._events.Tags()["scalars"], *self._events.Tags()["images"]}

    def curve(self, name: str) -> dict[int, float]:
        """Step -> value."""
        return {event.step: event.value for event in self._events.Scalars(name)}

    def pictures(self, name: str) -> dict[int, np.ndarray]:
        """Step -> pixels uint8 [H, W, 3]."""
        found = self._events.Images(name)
        return {event.step: np.asarray(Image.open(io.BytesIO(event.encoded_image_string))) for event in found}
