"""What the loop works with."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.backend import Backend, Mixed, World
from pipeline.best import Best
from pipeline.checkpoint import Checkpoints
from pipeline.data.device import DeviceAugment
from pipeline.data.quarantine import Quarantine
from pipeline.data.samples import Samples
from pipeline.data.stream import TrainStream
from pipeline.divergence import Skips, Spikes
from pipeline.durations import Durations
from pipeline.ema import EMA
from pipeline.evaluate import Evaluator
from pipeline.loss import Objective
from pipeline.models.toe import TokenStages
from pipeline.optim import WarmupCosine
from pipeline.recipe import Recipe
from pipeline.record import code_version
from pipeline.record.record import Record
from pipeline.sharded import Shard
from pipeline.telemetry.figures import Figures
from pipeline.telemetry.pictures import no_maps, no_samples
from pipeline.telemetry.profile import Profile


@dataclass(frozen=True)
class Input:
    """Samples on their way to the model."""

    stream: TrainStream
    augment: DeviceAugment
    validation: Samples


@dataclass(frozen=True)
class Learner:
    """The model and what moves and judges it."""

    backend: Backend
    criterion: Objective
    schedule: WarmupCosine
    tokens: TokenStages
    ema: EMA | None
    evaluator: Evaluator

    def pieces(self) -> dict[str, list[Shard]]:
        """What a checkpoint holds beside the engine, by the name of its directory."""
        found = {"ema": self.ema.state() if self.ema else [], "loss": self.criterion.state()}
        return {name: shards for name, shards in found.items() if shards}


@dataclass
class Progress:
    """`start` steps were done when the run was built; `saved` are in its newest checkpoint. For checkpoints, training
    has stood still for `save_seconds` since then."""

    start: int = 0
    saved: int = 0
    save_seconds: float = 0.0
    seconds_before: float = 0.0
    commit: str = field(default_factory=code_version)
    began: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Time spent on the run, earlier attempts included up to the checkpoint they were continued from."""
        return self.seconds_before + time.monotonic() - self.began


@dataclass(frozen=True)
class Telemetry:
    """What one sees beside the metrics. samples: given a step's first micro-batch as the model gets it; maps: after an
    evaluation."""

    figures: Figures
    profile: Profile
    samples: Callable[[int, Mixed], None] = no_samples
    maps: Callable[[int], None] = no_maps


@dataclass(frozen=True)
class Run:
    """All of it, on one rank. bottleneck: called before each step; False where a rank was told to stop."""

    recipe: Recipe
    world: World
    durations: Durations
    input: Input
    learner: Learner
    bottleneck: Callable[[int], bool]
    checkpoints: Checkpoints
    record: Record
    quarantine: Quarantine
    skips: Skips
    spikes: Spikes
    best: Best
    telemetry: Telemetry
    progress: Progress = field(default_factory=Progress)

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.run_dir)
