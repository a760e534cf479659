"""From a recipe to a Run: everything is built and checked here, so that what cannot work fails before the first step."""

import difflib
import functools
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

import pipeline.models  # noqa: F401 - registers our models with timm
from pipeline.augment import EvalTransform, Mixing, TrainTransform
from pipeline.backend import Backend, Criterion, StepOptions, World, wrap
from pipeline.checkpoint import Checkpoints
from pipeline.data import DeviceAugment, Loading, Samples, TrainStream
from pipeline.ema import EMA
from pipeline.evaluate import Evaluator, head_names
from pipeline.loss import SummedOverHeads
from pipeline.models.load import load_start
from pipeline.optim import WarmupCosine, adamw
from pipeline.recipe import Recipe, num_steps, validate
from pipeline.record import Record, keep_recipe
from shards.errors import UserError
from shards.index import Index
from shards.plan import Plan, check_layout
from shards.reader import Reader


@dataclass(frozen=True)
class Durations:
    """The recipe's durations in optimizer steps."""

    total: int
    log: int
    save: int
    evaluate: int


@dataclass
class Run:
    """What the loop works with, on one rank. `start` steps were done when it was built, `saved` is the last saved."""

    recipe: Recipe
    world: World
    durations: Durations
    schedule: WarmupCosine
    stream: TrainStream
    augment: DeviceAugment
    validation: Samples
    backend: Backend
    criterion: Criterion
    ema: EMA | None
    evaluator: Evaluator
    checkpoints: Checkpoints
    record: Record
    start: int = 0
    saved: int = 0
    seconds_before: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.run_dir)

    def seconds(self) -> float:
        """Time spent in this run, earlier attempts included up to the checkpoint they were continued from."""
        return self.seconds_before + time.monotonic() - self.started

    def averages(self) -> dict[str, Tensor]:
        return self.ema.state() if self.ema else {}


def prepare(recipe: Recipe, world: World) -> Run:
    """The run of a recipe on this rank, ready for the step after its newest checkpoint.

    Raises UserError for whatever cannot work: it is said before anything is trained.
    """
    validate(recipe)
    mixes = recipe.augment.mixup or recipe.augment.cutmix
    check_layout(recipe.data.global_batch, world.size, recipe.data.accumulation, pairs=mixes)
    make_deterministic(recipe)
    index = Index.load(recipe.data.path)
    stream, validation = make_streams(recipe, index, world)
    schedule, durations = make_schedule(recipe, stream.plan.batches_per_epoch)
    if world.is_main:
        keep_recipe(Path(recipe.run_dir), recipe)
    checkpoints = Checkpoints(Path(recipe.run_dir) / "checkpoints", world, recipe.checkpoint.keep)
    newest = checkpoints.newest()
    model = make_model(recipe, index.num_classes, fresh=newest is None, say=world.is_main)
    names = head_names(model)
    backend = make_backend(recipe, world, model)
    ema = EMA(backend.parameters(), recipe.ema_decay) if recipe.ema_decay else None
    run = Run(
        recipe=recipe,
        world=world,
        durations=durations,
        schedule=schedule,
        stream=stream,
        augment=make_device_augment(recipe, index.num_classes),
        validation=validation,
        backend=backend,
        criterion=SummedOverHeads(recipe.loss),
        ema=ema,
        evaluator=Evaluator(
            backend, names, {"": nullcontext} | ({"ema_": ema.swap} if ema else {}), len(validation.reader)
        ),
        checkpoints=checkpoints,
        record=Record(Path(recipe.run_dir), world.is_main),
    )
    begin(run, newest)
    return run


def begin(run: Run, newest: Path | None) -> None:
    """Restores the newest checkpoint, or starts the RNG of this rank; then warms the backend up."""
    run.stream.check_disjoint()
    seed = np.random.SeedSequence((run.recipe.seed, run.world.rank)).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(seed))
    if newest is not None:
        state = run.checkpoints.load(newest, run.backend, run.averages())
        run.stream.check_state(state["data"], newest)
        run.start = run.saved = state["step"]
        run.seconds_before = state["seconds"]
        if run.ema:
            run.ema.num_updates = state["ema_updates"]
    run.backend.warm_up(run.criterion, _blank(run))


def make_streams(recipe: Recipe, index: Index, world: World) -> tuple[TrainStream, Samples]:
    data, augment = recipe.data, recipe.augment
    transform = TrainTransform(
        augment.image_size,
        augment.crop_scale,
        augment.crop_ratio,
        augment.hflip,
        augment.randaugment_ops,
        augment.randaugment_magnitude,
    )
    train = Samples(Reader(index, data.train), transform, recipe.seed)
    validation = Samples(Reader(index, data.val), EvalTransform(augment.image_size), recipe.seed)
    plan = Plan(len(train.reader), index.fingerprint(data.train), recipe.seed, data.global_batch)
    loading = Loading(data.workers, world.device)
    return TrainStream(train, plan, world, data.accumulation, loading), validation


def make_schedule(recipe: Recipe, batches_per_epoch: int) -> tuple[WarmupCosine, Durations]:
    """Raises UserError where the warm-up does not end before the training does."""
    section = recipe.schedule
    total = num_steps(section.length, batches_per_epoch)
    warmup = num_steps(section.warmup, batches_per_epoch, total)
    if total < 1 or warmup >= total:
        raise UserError(
            f"schedule.warmup '{section.warmup}' is {warmup} steps, but schedule.length '{section.length}' is only {total} "
            f"({batches_per_epoch} steps an epoch): the learning rate would never be reached; train longer or warm up less"
        )

    def steps(duration: str) -> int:
        return max(1, num_steps(duration, batches_per_epoch, total))

    durations = Durations(
        total, steps(recipe.runtime.log_every), steps(recipe.checkpoint.every), steps(recipe.evaluation.every)
    )
    return WarmupCosine(section.lr, section.warmup_lr, section.min_lr, warmup, total), durations


def make_model(recipe: Recipe, num_classes: int, fresh: bool, say: bool) -> nn.Module:
    """The model on the CPU, initialised by the recipe's seed; with its start weights where the run is a fresh one.

    Raises UserError for an unknown model, options that it does not take, and start weights of another model.
    """
    section = recipe.model
    torch.manual_seed(recipe.seed)
    options = {name: value for name, value in vars(section).items() if name not in ("name", "start")}
    given = {name: value for name, value in options.items() if value is not None}
    try:
        model = timm.create_model(section.name, num_classes=num_classes, img_size=recipe.augment.image_size, **given)
    except RuntimeError as error:
        near = difflib.get_close_matches(section.name, timm.list_models(), n=3)
        raise UserError(
            f"model.name '{section.name}' is not in timm's registry ({error}); the nearest names are {near}"
        ) from None
    except TypeError as error:
        raise UserError(f"model.name '{section.name}' does not take the options {given}: {error}") from None
    if section.start and fresh:
        loaded = load_start(model, section.start, new_heads=True)
        if say:
            print(
                f"start weights {section.start}: {len(loaded.loaded)} loaded, made new: {', '.join(loaded.made_new)}; "
                f"dropped: {', '.join(loaded.dropped) or 'none'}",
                flush=True,
            )
    return model


def make_backend(recipe: Recipe, world: World, model: nn.Module) -> Backend:
    section = recipe.optimizer
    make_optimizer = functools.partial(
        adamw, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay
    )
    options = StepOptions(recipe.data.accumulation, section.clip_norm, recipe.runtime.precision == "bf16")
    micro_batch = recipe.data.global_batch // world.size // recipe.data.accumulation
    return wrap(world, model, make_optimizer, micro_batch, options)


def make_device_augment(recipe: Recipe, num_classes: int) -> DeviceAugment:
    section = recipe.augment
    mixing = Mixing(section.mixup, section.cutmix, section.mixup_alpha)
    return DeviceAugment(num_classes, recipe.seed, section.erasing, mixing)


def make_deterministic(recipe: Recipe) -> None:
    if recipe.runtime.deterministic:
        # cuBLAS reads it when its handle is made, at the first product on the device.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(recipe.runtime.deterministic)


def _blank(run: Run) -> tuple[Tensor, Tensor]:
    """A micro-batch of the right shape for passes that are discarded."""
    batch = len(next(run.stream.requests(0, 1)).ids)
    side, classes = run.recipe.augment.image_size, run.augment.num_classes
    images = torch.zeros(batch, 3, side, side, device=run.world.device)
    return images, torch.full((batch, classes), 1 / classes, device=run.world.device)
