"""When images grow and their augmentation strengthens in the course of a training."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Progressive:
    steps: tuple[int, ...] = ()
    """Training by stages, as EfficientTrain's: epochs, the first 0, each of which begins a stage with images of its own
    side and its own RandAugment; empty: off."""
    image_sizes: tuple[int, ...] = ()
    """Side of each stage's training images, in pixels; the last and largest is augment.image_size, at which the model
    is evaluated. Empty: always that."""
    randaugment_magnitudes: tuple[int, ...] = ()
    """RandAugment magnitude of each stage, the last augment.randaugment_magnitude. Empty: always that."""

    def errors(self) -> Iterator[str]:
        """What cannot work whatever the other sections are, each beginning with the field's name."""
        given = {name: values for name, values in vars(self).items() if name != "steps" and values}
        if self.steps and not given:
            yield (
                f"steps {self.steps}: image_sizes and randaugment_magnitudes are empty, so that no stage would differ "
                "from another: give one of them, or no steps"
            )
        for name, values in given.items():
            if len(values) != len(self.steps):
                yield (
                    f"steps {self.steps} and {name} {values}: each stage has one of both, but they are "
                    f"{len(self.steps)} and {len(values)}"
                )
        ascend = all(low < high for low, high in itertools.pairwise(self.steps))
        if self.steps and (self.steps[0] != 0 or not ascend):
            yield f"steps {self.steps}: epochs at which stages begin: the first must be 0, each above the one before"
        if min(self.image_sizes, default=1) < 1:
            yield f"image_sizes {self.image_sizes}: each must be 1 or more"
