"""When a model trains on a part of its tokens."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

DISTANCES = ("cosine", "manhattan", "euclidean")


@dataclass(frozen=True)
class TokenExpansion:
    steps: tuple[int, ...] = ()
    """ToE, token expansion, for ViT, DeiT and ViTTM: epochs, counted from 0, each of which begins a stage that trains
    on more tokens; empty: off."""
    keep_rates: tuple[float, ...] = ()
    """Share of the patches' tokens that each stage keeps; 1 all, without a selection."""
    initial_keep_rate: float = 0.25
    """Share of them that lie on an even grid, from which every stage's selection begins."""
    repetitions: int = 2
    """Rounds in which a stage's tokens are added."""
    distance: Literal["cosine", "manhattan", "euclidean"] = "cosine"
    """How far tokens are from each other: by the angle between them, or with length 1 by one of these."""

    def errors(self) -> Iterator[str]:
        """What cannot work, each beginning with the field's name."""
        if not self.steps and not self.keep_rates:
            return
        if len(self.steps) != len(self.keep_rates):
            yield (
                f"steps {self.steps} and keep_rates {self.keep_rates}: each stage has one of both, but they are "
                f"{len(self.steps)} and {len(self.keep_rates)}"
            )
        if not _ascend(self.steps) or min(self.steps, default=0) < 0:
            yield f"steps {self.steps}: epochs, from 0, at which stages begin: each must be above the one before"
        if not _ascend(self.keep_rates) or not all(0 < rate <= 1 for rate in self.keep_rates):
            yield f"keep_rates {self.keep_rates}: shares of tokens, 0 < rate <= 1: each must be above the one before"
        if not 0 < self.initial_keep_rate < min(self.keep_rates, default=1):
            yield (
                f"initial_keep_rate {self.initial_keep_rate}: must be above 0 and below the first of keep_rates "
                f"{self.keep_rates}, which it is expanded to"
            )
        if self.repetitions < 1:
            yield f"repetitions {self.repetitions}: must be 1 or more"
        if self.distance not in DISTANCES:
            yield f"distance '{self.distance}': there are {', '.join(DISTANCES)}"


def _ascend(values: Sequence[float]) -> bool:
    return all(low < high for low, high in itertools.pairwise(values))
