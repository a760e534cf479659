"""How often finished weights are right: on a split of shards or on class folders, every image once on any world."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.backend import World, autocast, cast_inputs
from pipeline.data.batch import Batch
from pipeline.data.loading import Loading
from pipeline.data.samples import Samples
from pipeline.data.stream import evaluation_batches
from pipeline.evaluate import Evaluator, head_names
from pipeline.predict.checkpoint import Checkpoint
from pipeline.predict.matching import match
from pipeline.predict.real import Real, read_real
from pipeline.recipe import Recipe
from shards.errors import UserError
from shards.files_reader import FilesReader, read_folders
from shards.index import MANIFEST
from shards.members import MemberReader
from shards.reader import BadSample
from shards.store import StoreOptions, open_data

REAL = "real_top1"


@dataclass(frozen=True)
class Images:
    """Labelled images and what their labels stand for; `where` is what messages call them."""

    reader: MemberReader | FilesReader
    classes: tuple[str, ...]
    where: str


@dataclass(frozen=True)
class Settings:
    """How to evaluate: samples of a forward pass of a rank, processes a rank that decode, and the arithmetic as the
    recipe's runtime.precision has it; `real`: ReaL's real.json, for its figure too."""

    batch: int
    workers: int
    precision: str = "fp32"
    real: Path | None = None

    @classmethod
    def of(cls, recipe: Recipe | None, workers: int) -> "Settings":
        """What the run itself evaluated with; of weights from elsewhere, a recipe's defaults."""
        recipe = recipe or Recipe()
        return cls(recipe.evaluation.batch, workers, recipe.runtime.precision)


@dataclass(frozen=True)
class Scores:
    """`values`: by the names that a run's metrics.jsonl has them under, and, with ReaL, HEAD_real_top1. `classes`: of
    the checkpoint's, how many the data has, matched by `matched` ("name" or "number"); `bad`: unreadable images of all
    ranks."""

    values: dict[str, float]
    num_samples: int
    classes: int
    matched: str
    bad: list[BadSample]
    real: Real | None


def is_class_folders(location: str) -> bool:
    """Whether that is taken for a directory of class folders; whatever else it is has to be shards. Tars alone are
    shards that lack their index."""
    path = Path(location)
    only_tars = any(path.glob("*.tar")) and not any(path.glob("[!.]*/"))
    return path.is_dir() and not (path / MANIFEST).is_file() and not only_tars


def open_images(location: str, split: str, asked: Checkpoint, options: StoreOptions) -> Images:
    """A split of shards in a directory or at a URL ("": the one that the checkpoint's run evaluated on, else val), or a
    directory of class folders, which has no splits.

    Raises UserError where there are none.
    """
    if is_class_folders(location):
        if split:
            raise UserError(
                f"--split {split}: {location} has no {MANIFEST}, so it is taken for class folders, which have no "
                "splits: give the directory that holds the folders, and no --split"
            )
        reader, names = read_folders(location)
        return Images(reader, names, f"the class folders in {location}")
    index, store = open_data(location, options)
    recipe = asked.recipe or Recipe()
    members = MemberReader(index, split or recipe.data.val, store)
    return Images(members, index.classes, f"split {members.split!r} of {location}")


def evaluate(
    variants: Mapping[str, Checkpoint],
    images: Images,
    settings: Settings,
    world: World,
    watch: Callable[[Iterator[Batch]], Iterable[Batch]] = lambda batches: batches,
) -> Scores | None:
    """The figures of every head of the variants (weights of one model, by the prefix of their figures), as the trainer
    computes them; None where a rank was told to stop. Every rank calls it; `watch` is given the batches to hand on.

    Raises UserError where the data's classes are not the checkpoint's, and as `read_real`.
    """
    asked = next(iter(variants.values()))
    if not len(images.reader):
        raise UserError(f"{images.where} holds no images: give other data")
    labels, matched = match(images.classes, asked, images.where)
    real = read_real(settings.real, images.reader, asked, world) if settings.real else None
    engine = _Whole(world, variants, settings.precision)
    samples = Samples(images.reader, asked.view.transform, 0, substitutes=False)
    evaluator = Evaluator(
        engine,
        engine.head_names,
        {prefix: partial(engine.using, prefix) for prefix in variants},
        len(images.reader),
        {REAL: real} if real else {},
        asked.view.normalise,
    )
    bad: list[BadSample] = []
    with evaluation_batches(samples, settings.batch, world, Loading(settings.workers, world.device)) as batches:
        table = torch.tensor(labels, device=world.device)
        values = evaluator(_relabelled(watch(batches), table, bad))
    if values is None:
        return None
    everyone = [error for rank in world.gather(bad) for error in rank]
    return Scores(values, len(images.reader), len(labels), matched, everyone, real)


def _relabelled(batches: Iterable[Batch], table: Tensor, bad: list[BadSample]) -> Iterator[Batch]:
    """The batches with the checkpoint's labels in place of the data's; what is bad is noted."""
    for batch in batches:
        bad += [error for error, _ in batch.bad]
        labels = torch.where(batch.labels < 0, batch.labels, table[batch.labels.clamp(min=0)])
        yield dataclasses.replace(batch, labels=labels)


class _Whole:
    """The engine of an Evaluator: every rank has the whole models, of which one is called at a time."""

    def __init__(self, world: World, variants: Mapping[str, Checkpoint], precision: str) -> None:
        self.world, self._precision = world, precision
        self._models = {prefix: _made(asked.model, world.device, precision) for prefix, asked in variants.items()}
        self.head_names = [head_names(model) for model in self._models.values()][-1]
        self.module = next(iter(self._models.values()))

    def autocast(self) -> torch.autocast:
        return autocast(self.world.device, self._precision)

    @contextmanager
    def using(self, prefix: str) -> Iterator[None]:
        """Within, the module is that variant."""
        kept, self.module = self.module, self._models[prefix]
        try:
            yield
        finally:
            self.module = kept


def _made(model: nn.Module, device: torch.device, precision: str) -> nn.Module:
    """The model as it computes in evaluation; the one that was given still answers as it did."""
    if precision != "bf16-pure":
        return copy.copy(model.to(device))  # `head_names` sets an attribute
    pure = copy.deepcopy(model).to(device, torch.bfloat16)
    cast_inputs(pure, torch.bfloat16)
    return pure
