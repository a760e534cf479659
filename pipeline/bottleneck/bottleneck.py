"""What the bottleneck's loss has to know of an epoch, found at its start from some of the training samples.

Shapes: n samples of a rank, K centroids, D width of features, C classes.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.augment.device import normalise
from pipeline.augment.exact import EvalTransform
from pipeline.backend import Stopped, World
from pipeline.bottleneck.kmeans import Share, kmeans, summable
from pipeline.bottleneck.loss import BottleneckLoss
from pipeline.data.batch import UNREADABLE, Batch
from pipeline.data.loading import Loading
from pipeline.data.samples import Readable, Samples
from pipeline.data.stream import TrainStream, arriving, evaluation_batches
from pipeline.loss import Objective
from pipeline.models.ltm_loss import class_sums, mutual_information, soft_assign
from pipeline.recipe import Recipe
from pipeline.validate import num_steps
from shards.errors import UserError

Show = Callable[[int, Mapping[str, float]], None]


class Engine(Protocol):
    """The part of a Backend that is needed here."""

    @property
    def world(self) -> World: ...
    @property
    def module(self) -> nn.Module: ...
    def autocast(self) -> AbstractContextManager: ...


@dataclass(frozen=True)
class Some:
    """`number` samples of a split, evenly spaced, as a split of their own: all classes are there in equal shares,
    whether the shards are sorted by them or shuffled."""

    whole: Readable
    number: int

    def __len__(self) -> int:
        return min(self.number, len(self.whole))

    def read(self, sample_id: int, decode: Callable[[bytes], NDArray], /) -> tuple[NDArray, int]:
        return self.whole.read(sample_id * len(self.whole) // len(self), decode)


@dataclass
class Bottleneck:
    """Called before each step, it keeps the loss up to date, and shows what it found of an epoch.

    `samples`: those to look at, as evaluation sees them, whole and not augmented; `first_epoch`: the first that is
    trained with the bottleneck. Pixels are clustered once, for they do not change.
    """

    engine: Engine
    loss: BottleneckLoss
    samples: Samples
    loading: Loading
    batch: int
    iterations: int
    first_epoch: int
    batches_per_epoch: int
    show: Show
    phi_x: Tensor | None = field(default=None, init=False)  # (n, K)

    @torch.no_grad()
    def __call__(self, step: int) -> bool:
        """step: counted from 0. False where a rank was told to stop before the end of it."""
        epoch, position = divmod(step, self.batches_per_epoch)
        self.loss.is_on = epoch >= self.first_epoch
        try:
            if self.phi_x is None:
                self.phi_x = self._look_at_pixels()
            if position == 0:
                self.show(step, self._look_at_features(self.phi_x))
        except Stopped:
            return False
        return True

    def _look_at_pixels(self) -> Tensor:
        """Clusters them; the assignments of all images."""
        images, labels = self._of_all(lambda batch: batch.images.cpu().clone(memory_format=torch.contiguous_format))
        readable = Share(self.engine.world, images[labels != UNREADABLE], self._pixels)
        self.loss.pixels.copy_(kmeans(readable, len(self.loss.pixels), self.iterations))
        return Share(self.engine.world, images, self._pixels).map(lambda rows: soft_assign(rows, self.loss.pixels))

    def _look_at_features(self, phi_x: Tensor) -> dict[str, float]:
        """Clusters them, and then takes the profiles of classes; what pixels and labels tell of them, in nats."""
        found, labels = self._of_all(self._features)
        known = (labels != UNREADABLE).to(found.device)
        labels, share = labels.to(found.device)[known], Share(self.engine.world, found[known], Tensor.float)
        self.loss.features.copy_(kmeans(share, len(self.loss.features), self.iterations))
        phi_f = summable(share.map(lambda rows: soft_assign(rows, self.loss.features)))
        sums, counts = self._by_class(phi_f, labels)
        self.loss.profile.copy_(sums / counts.clamp(min=1))
        of_pixels = self.engine.world.total(phi_f.mT @ phi_x[known].double())
        pixels, classes = (mutual_information(joint / counts.sum()).item() for joint in (of_pixels, sums))
        return {"pixels": pixels, "labels": classes, "difference": pixels - classes}

    def _by_class(self, phi_f: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of assignments, (K, C), and numbers of samples, (C), over all ranks."""
        num_classes = self.loss.profile.shape[1]
        counts = torch.bincount(labels, minlength=num_classes).double()
        total = self.engine.world.total
        return total(class_sums(phi_f, labels, num_classes).contiguous()), total(counts)

    def _features(self, batch: Batch) -> Tensor:
        with self.engine.autocast():
            self.engine.module(normalise(batch.images))
        return self.loss.tap.take()[1]

    def _of_all(self, look: Callable[[Batch], Tensor]) -> tuple[Tensor, Tensor]:
        """`look` of this rank's samples, and their labels, on the CPU; UNREADABLE where there is nothing to look at."""
        world, module = self.engine.world, self.engine.module
        was_training = module.training
        module.eval()
        try:
            with evaluation_batches(self.samples, self.batch, world, self.loading) as batches:
                found = [(look(batch), batch.labels.cpu()) for batch in arriving(batches, world, "bottleneck")]
        finally:
            module.train(was_training)
        looked, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        return looked, labels

    def _pixels(self, images: Tensor) -> Tensor:
        """uint8 (n, 3, H, W) -> float (n, 3 H W), on the device, as the model sees them."""
        return normalise(images.to(self.engine.world.device)).flatten(1)


def nothing_to_find(step: int) -> bool:
    return True


def make_bottleneck(
    recipe: Recipe, engine: Engine, objective: Objective, stream: TrainStream, show: Show
) -> Callable[[int], bool]:
    """What a run calls before each step.

    Raises UserError where the training ends before the bottleneck is in the loss, or there are too few samples.
    """
    if not isinstance(objective, BottleneckLoss):
        return nothing_to_find
    section, reader = recipe.bottleneck, stream.samples.reader
    samples = Samples(Some(reader, section.samples), EvalTransform.of(recipe), recipe.seed, substitutes=False)
    if len(samples.reader) < section.centroids:
        raise UserError(
            f"bottleneck.centroids {section.centroids}: split '{recipe.data.train}' has only {len(reader)} samples to "
            "cluster: give fewer"
        )
    per_epoch, epochs = stream.plan.batches_per_epoch, _epochs_before(recipe, stream)
    about = section.iterations, epochs, per_epoch
    return Bottleneck(engine, objective, samples, stream.loading, recipe.evaluation.batch, *about, show)


def _epochs_before(recipe: Recipe, stream: TrainStream) -> int:
    per_epoch, batch, section = stream.plan.batches_per_epoch, recipe.data.global_batch, recipe.bottleneck
    total = num_steps(recipe.schedule.length, per_epoch, batch)
    epochs = math.ceil(num_steps(section.after, per_epoch, batch, total) / per_epoch)
    if epochs * per_epoch >= total:
        raise UserError(
            f"bottleneck.after '{section.after}' is {epochs} whole epochs of {per_epoch} steps, but schedule.length "
            f"'{recipe.schedule.length}' is {total} steps: the bottleneck would never be in the loss; begin it "
            "earlier, or train longer"
        )
    return epochs
