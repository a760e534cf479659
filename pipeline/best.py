"""Which evaluation was the best so far: of the weights, and of their average."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

WEIGHTS = {"": "model", "ema_": "ema"}
"""Prefix of a metric's name -> what its weights are called."""


class Score(NamedTuple):
    step: int
    metric: str
    value: float


@dataclass
class Best:
    """The first of the highest top-1 of the head `head`; "ema_" of the average apart."""

    head: str
    scores: dict[str, Score] = field(default_factory=dict)

    @classmethod
    def of(cls, head_names: Sequence[str], lines: Iterable[dict]) -> "Best":
        """By the memory head, or by the first where there is none; `lines`: of the metrics so far."""
        best = cls("memory" if "memory" in head_names else head_names[0])
        for line in lines:
            if "split" in line:
                best.add(line["step"], line)
        return best

    def add(self, step: int, values: Mapping[str, float]) -> dict[str, Score]:
        """{"model": .., "ema": ..}: the scores of an evaluation that are better than all before."""
        found = {name: self._score(prefix, step, values) for prefix, name in WEIGHTS.items()}
        better = {name: score for name, score in found.items() if score and self._beats(name, score)}
        self.scores |= better
        return better

    def steps(self) -> dict[str, int]:
        """{"best_step": .., "ema_best_step": ..}: when they were had."""
        return {f"{prefix}best_step": self.scores[name].step for prefix, name in WEIGHTS.items() if name in self.scores}

    def _score(self, prefix: str, step: int, values: Mapping[str, float]) -> Score | None:
        metric = f"{prefix}{self.head}_top1"
        return Score(step, metric, values[metric]) if metric in values else None

    def _beats(self, name: str, score: Score) -> bool:
        return name not in self.scores or score.value > self.scores[name].value
