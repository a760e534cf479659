"""From a recipe to a Run: built and checked here, so that what cannot work fails before the first step."""

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
from pipeline.augment.exact import EvalTransform, TrainTransform
from pipeline.augment.fast import FastTrainTransform
from pipeline.augment.mixing import Mixing
from pipeline.backend import Backend, Criterion, StepOptions, World, wrap
from pipeline.checkpoint import Checkpoints, read_state
from pipeline.data.device import DeviceAugment
from pipeline.data.loading import Loading, serve_workers
from pipeline.data.quarantine import Quarantine
from pipeline.data.samples import Samples
from pipeline.data.stream import TrainStream
from pipeline.divergence import Skips, Spikes
from pipeline.ema import EMA
from pipeline.evaluate import Evaluator, Variants, head_names
from pipeline.loss import SummedOverHeads
from pipeline.models.load import load_start
from pipeline.optim import WarmupCosine, adamw
from pipeline.recipe import Recipe
from pipeline.record import Record, check_same_recipe, keep_recipe
from pipeline.sharded import Shard
from pipeline.validate import num_steps, validate
from shards.budget import Budget
from shards.errors import UserError
from shards.index import Index
from shards.plan import GlobalShuffle, Plan, Shuffle, WindowShuffle, check_layout, default_runs
from shards.reader import Reader
from shards.store import Store, StoreOptions, open_data


@dataclass(frozen=True)
class Durations:
    """The recipe's durations in optimizer steps."""

    total: int
    log: int
    save: int
    evaluate: int


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
    criterion: Criterion
    schedule: WarmupCosine
    ema: EMA | None
    evaluator: Evaluator

    def averages(self) -> list[Shard]:
        return self.ema.state() if self.ema else []


@dataclass
class Progress:
    """`start` steps were done when the run was built; `saved` are in its newest checkpoint."""

    start: int = 0
    saved: int = 0
    seconds_before: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Time spent on the run, earlier attempts included up to the checkpoint they were continued from."""
        return self.seconds_before + time.monotonic() - self.began


@dataclass(frozen=True)
class Run:
    """What the loop works with, on one rank."""

    recipe: Recipe
    world: World
    durations: Durations
    input: Input
    learner: Learner
    checkpoints: Checkpoints
    record: Record
    quarantine: Quarantine
    skips: Skips
    spikes: Spikes
    progress: Progress = field(default_factory=Progress)

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.run_dir)


def prepare(recipe: Recipe, world: World) -> Run:
    """The run of a recipe on this rank, ready for the step after its newest checkpoint.

    Raises UserError for whatever cannot work.
    """
    validate(recipe)
    mixes = recipe.augment.mixup or recipe.augment.cutmix
    check_layout(recipe.data.global_batch, world.size, recipe.data.accumulation, pairs=mixes)
    make_deterministic(recipe)
    if recipe.data.workers:
        serve_workers()
    options = StoreOptions(recipe.data.remote, recipe.data.cache, recipe.data.cache_size)
    index, store = open_data(recipe.data.path, options)
    given = make_input(recipe, index, store, world)
    schedule, durations = make_schedule(recipe, given.stream.plan.batches_per_epoch)
    run_dir = Path(recipe.run_dir)
    checkpoints = Checkpoints(run_dir / "checkpoints", world, recipe.checkpoint.keep)
    newest = checkpoints.newest()
    if newest is not None:
        check_same_recipe(read_state(newest)["recipe"], recipe, newest)
    model = make_model(recipe, index.num_classes)
    if recipe.model.start and newest is None:
        start_from(model, recipe.model.start, say=world.is_main)
    learner = make_learner(recipe, world, model, schedule, len(given.validation.reader))
    record = Record(run_dir, world.is_main, recipe.data.global_batch)
    budget = Budget(recipe.data.max_bad).allows(given.stream.plan.num_samples)
    quarantine = Quarantine(run_dir, world, recipe.data.train, budget)
    skips, spikes = Skips(run_dir, world, recipe.runtime.max_skipped), Spikes(recipe.runtime.spike)
    run = Run(recipe, world, durations, given, learner, checkpoints, record, quarantine, skips, spikes)
    begin(run, newest)
    if world.is_main:
        keep_recipe(run_dir, recipe)
    return run


def begin(run: Run, newest: Path | None) -> None:
    """Restores the newest checkpoint, or starts the RNG of this rank; then warms the backend up."""
    run.input.stream.check_disjoint()
    seed_rank(run, step=0)
    if newest is not None:
        restore(run, newest)
    run.quarantine.resume(run.progress.start)
    run.skips.resume(run.progress.start)
    run.learner.backend.warm_up(run.learner.criterion, _blank(run))


def restore(run: Run, path: Path) -> None:
    """Raises UserError where the checkpoint is of other data, or of a launch that this one cannot take over: DDP and
    FSDP2 read each other's on any world, ZeRO's partitions belong to ZeRO and to a world of one size."""
    state, world, strategy = read_state(path), run.world, run.learner.backend.name
    run.input.stream.check_state(state["data"], path)
    moved = state["world"] != world.size
    zero = "zero" in strategy or "zero" in state["strategy"]
    if zero and (moved or strategy != state["strategy"]):
        raise UserError(
            f"{path} was saved by {state['world']} ranks of {state['strategy']}, and cannot be continued by "
            f"{world.size} ranks of {strategy}: DeepSpeed's files fit the same ZeRO stage alone, on as many ranks; "
            "start it with the launch file that it began with, or begin anew in another --run-dir"
        )
    load(run, path)
    run.progress.start = run.progress.saved = state["step"]
    run.progress.seconds_before = state["seconds"]
    if moved:
        seed_rank(run, state["step"])


def load(run: Run, path: Path) -> None:
    """What a checkpoint of this run holds of its learner."""
    state = read_state(path)
    run.checkpoints.load(path, run.learner.backend, run.learner.averages())
    run.spikes.resume(state["losses"])
    if run.learner.ema:
        run.learner.ema.num_updates = state["ema_updates"]


def seed_rank(run: Run, step: int) -> None:
    """Draws inside the model (dropout, drop path) are a rank's own; all others are keyed and need no seed."""
    entropy = (run.recipe.seed, run.world.rank, step)
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


def make_input(recipe: Recipe, index: Index, store: Store, world: World) -> Input:
    data, augment = recipe.data, recipe.augment
    transform_class = TrainTransform if augment.decode == "exact" else FastTrainTransform
    transform = transform_class(
        augment.image_size,
        augment.crop_scale,
        augment.crop_ratio,
        augment.hflip,
        augment.randaugment_ops,
        augment.randaugment_magnitude,
    )
    train = Samples(Reader(index, data.train, store), transform, recipe.seed, substitutes=True)
    seen_once = EvalTransform(augment.image_size)
    validation = Samples(Reader(index, data.val, store), seen_once, recipe.seed, substitutes=False)
    shuffle = make_shuffle(recipe, index)
    plan = Plan(len(train.reader), index.fingerprint(data.train), recipe.seed, data.global_batch, shuffle)
    stream = TrainStream(train, plan, world, data.accumulation, Loading(data.workers, world.device))
    mixing = Mixing(augment.mixup, augment.cutmix, augment.mixup_alpha)
    on_device = DeviceAugment(index.num_classes, recipe.seed, augment.erasing, mixing)
    return Input(stream, on_device, validation)


def make_shuffle(recipe: Recipe, index: Index) -> Shuffle:
    data = recipe.data
    if data.shuffle == "global":
        return GlobalShuffle()
    shard_sizes = tuple(shard.num_samples for shard in index.split(data.train).shards)
    return WindowShuffle(shard_sizes, data.runs or default_runs(data.global_batch), data.window)


def make_schedule(recipe: Recipe, batches_per_epoch: int) -> tuple[WarmupCosine, Durations]:
    """Raises UserError where the warm-up does not end before the training does."""
    section = recipe.schedule
    total = num_steps(section.length, batches_per_epoch)
    warmup = num_steps(section.warmup, batches_per_epoch, total)
    if total < 1 or warmup >= total:
        raise UserError(
            f"schedule.warmup '{section.warmup}' is {warmup} steps, but schedule.length '{section.length}' is only "
            f"{total} ({batches_per_epoch} steps an epoch): the learning rate would never be reached; train longer or "
            "warm up less"
        )

    def steps(duration: str) -> int:
        return max(1, num_steps(duration, batches_per_epoch, total))

    durations = Durations(
        total, steps(recipe.runtime.log_every), steps(recipe.checkpoint.every), steps(recipe.evaluation.every)
    )
    return WarmupCosine(section.lr, section.warmup_lr, section.min_lr, warmup, total), durations


def make_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The model on the CPU, initialised by the recipe's seed, the same on every rank.

    Raises UserError for an unknown model and for options that it does not take.
    """
    section = recipe.model
    torch.manual_seed(recipe.seed)
    options = {name: value for name, value in vars(section).items() if name not in ("name", "start")}
    given = {name: value for name, value in options.items() if value is not None}
    if not timm.is_model(section.name):
        near = difflib.get_close_matches(section.name, timm.list_models(), n=3)
        raise UserError(f"model.name '{section.name}' is not in timm's registry; the nearest names there are {near}")
    try:
        return timm.create_model(section.name, num_classes=num_classes, img_size=recipe.augment.image_size, **given)
    except TypeError as error:
        raise UserError(f"model.name '{section.name}' does not take the options {given}: {error}") from error


def start_from(model: nn.Module, path: str, say: bool) -> None:
    """Start weights with new heads. Raises UserError where they are of another model."""
    loaded = load_start(model, path, new_heads=True)
    if say:
        made_new, dropped = ", ".join(loaded.made_new), ", ".join(loaded.dropped) or "none"
        print(
            f"start weights {path}: {len(loaded.loaded)} loaded; made new: {made_new}; dropped: {dropped}", flush=True
        )


def make_learner(recipe: Recipe, world: World, model: nn.Module, schedule: WarmupCosine, num_evaluated: int) -> Learner:
    section = recipe.optimizer
    names = head_names(model)
    make_optimizer = functools.partial(adamw, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay)
    options = StepOptions.of(recipe)
    micro_batch = recipe.data.global_batch // world.size // recipe.data.accumulation
    backend = wrap(world, model, make_optimizer, micro_batch, options)
    ema = EMA(backend, recipe.ema_decay) if recipe.ema_decay else None
    variants: Variants = {"": nullcontext} | ({"ema_": ema.swap} if ema else {})
    evaluator = Evaluator(backend, names, variants, num_evaluated)
    return Learner(backend, SummedOverHeads(recipe.loss), schedule, ema, evaluator)


def make_deterministic(recipe: Recipe) -> None:
    if recipe.runtime.deterministic:
        # cuBLAS reads it when its handle is made, at the first product on the device.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(recipe.runtime.deterministic)


def _blank(run: Run) -> tuple[Tensor, Tensor]:
    """A micro-batch of the right shape for passes that are discarded."""
    batch = len(next(run.input.stream.requests(0, 1)).ids)
    side, classes = run.recipe.augment.image_size, run.input.augment.num_classes
    images = torch.zeros(batch, 3, side, side, device=run.world.device)
    return images, torch.full((batch, classes), 1 / classes, device=run.world.device)
