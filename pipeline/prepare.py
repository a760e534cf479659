"""From a recipe to a Run: built and checked here, so that what cannot work fails before the first step."""

import functools
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import optim
from pipeline.augment.exact import EvalTransform, TrainTransform
from pipeline.augment.fast import FastTrainTransform
from pipeline.backend import StepOptions, World, wrap
from pipeline.backend.tracking import check_installed, open_trackers
from pipeline.best import Best
from pipeline.bottleneck import make_bottleneck, make_objective
from pipeline.checkpoint import Checkpoints, read_state
from pipeline.data.device import DeviceAugment
from pipeline.data.loading import Loading, serve_workers
from pipeline.data.quarantine import Quarantine
from pipeline.data.samples import Samples
from pipeline.data.stream import TrainStream
from pipeline.divergence import Skips, Spikes
from pipeline.durations import Durations, make_schedule
from pipeline.ema import EMA
from pipeline.evaluate import Evaluator, Variants, head_names
from pipeline.footprint import check_room, measure
from pipeline.models.build import give_start, make_model
from pipeline.models.stages import check_image_sizes
from pipeline.models.toe import TokenStages
from pipeline.optim import WarmupCosine
from pipeline.recipe import Recipe, flatten, stages
from pipeline.record import check_same_recipe, check_writable, keep_classes, keep_recipe, kept_metrics
from pipeline.record.attempts import Setting, hardware
from pipeline.record.record import Record
from pipeline.run import Input, Learner, Run, Telemetry
from pipeline.telemetry.figures import Figures
from pipeline.telemetry.flops import NO_FLOPS, Flops, peak_flops
from pipeline.telemetry.norms import GradientNorms
from pipeline.telemetry.pictures import AttentionMaps, AugmentedSamples, has_maps, no_maps, no_samples
from pipeline.telemetry.profile import Profile
from pipeline.validate import validate
from shards.budget import Budget
from shards.errors import UserError
from shards.index import Index
from shards.layout import Layout
from shards.plan import GlobalShuffle, Plan, Shuffle, WindowShuffle, default_runs
from shards.reader import Reader
from shards.store import Store, StoreOptions, open_data

UNEVEN_IS_SERVED = (
    ", or begin the run under DDP or FSDP2 (ds_configs/ddp_*.yaml, fsdp_*.yaml), whose ranks may take unequal shares"
)


def prepare(recipe: Recipe, world: World) -> Run:
    """The run of a recipe on this rank, ready for the step after its newest checkpoint.

    Raises UserError for whatever cannot work, and Stopped where a rank is signalled to stop. Of a dry run nothing is
    written.
    """
    check(recipe, world)
    run_dir = Path(recipe.run_dir)
    check_writable(run_dir)
    make_deterministic(recipe)
    if recipe.data.workers:
        serve_workers()
    options = StoreOptions(recipe.data.remote, recipe.data.cache, recipe.data.cache_size)
    world.reach("opening the data")
    index, store = open_data(recipe.data.path, options)
    given = make_input(recipe, index, store, world)
    per_epoch = given.stream.plan.batches_per_epoch
    schedule, durations = make_schedule(recipe, per_epoch)
    stages.check_begun(recipe, per_epoch, durations.total)
    check_image_sizes(recipe)
    checkpoints = Checkpoints.of(run_dir, world.apart(), recipe.checkpoint)
    newest = checkpoints.newest()
    if newest is not None:
        check_same_recipe(read_state(newest)["recipe"], recipe, newest)
    world.reach("building the model")
    model = make_model(recipe, index.num_classes)
    if newest is None:
        started = give_start(model, recipe.model)
        if world.is_main:
            print(started, flush=True)
    footprint = measure(recipe, model)  # before it is sharded
    tokens = TokenStages.of(recipe.token_expansion, model, per_epoch)
    learner = make_learner(recipe, world, model, schedule, tokens, given)
    free = world.from_main(shutil.disk_usage(run_dir).free)
    check_room(footprint.checkpoint(learner.backend.name), free, run_dir)
    record = make_record(recipe, world, index, learner)
    budget = Budget(recipe.data.max_bad).allows(given.stream.plan.num_samples)
    quarantine = Quarantine(run_dir, world, recipe.data.train, budget)
    kept = kept_metrics(run_dir, read_state(newest)["step"] if newest else 0) if world.is_main else []
    best = Best.of(learner.evaluator.head_names, world.from_main(kept))
    skips, spikes = Skips(run_dir, world, recipe.runtime.max_skipped), Spikes(recipe.runtime.spike)
    telemetry = make_telemetry(recipe, index, learner, given, record, durations)
    bottleneck = make_bottleneck(recipe, learner.backend, learner.criterion, given.stream, record.information)
    parts = recipe, world, durations, given, learner, bottleneck, checkpoints, record, quarantine, skips, spikes, best
    run = Run(*parts, telemetry)
    begin(run, newest)
    telemetry.profile.check(durations.total - run.progress.start)
    if recipe.dry_run:
        return run
    record.trackers += open_trackers(recipe.wandb, run_dir, flatten(recipe), world)
    if world.is_main:
        keep_recipe(run_dir, recipe)
        keep_classes(run_dir, index.classes)
    return run


def check(recipe: Recipe, world: World) -> None:
    """Raises UserError for what the recipe and the launch alone show not to work."""
    validate(recipe)
    optim.table.check(recipe.optimizer.name, world.strategy)
    check_installed(recipe.wandb)
    check_layout(make_layout(recipe, world), world.strategy)


def begin(run: Run, newest: Path | None) -> None:
    """Restores the newest checkpoint, or starts the RNG of this rank; then warms the backend up."""
    run.input.stream.check_disjoint()
    seed_rank(run, step=0)
    if newest is not None:
        run.world.reach(f"restoring {newest.name}")
        restore(run, newest)
    run.quarantine.resume(run.progress.start)
    run.skips.resume(run.progress.start)
    run.learner.tokens(run.progress.start)
    run.world.reach("warming up")
    run.learner.backend.warm_up(run.learner.criterion, _blank(run))


def restore(run: Run, path: Path) -> None:
    """Raises UserError where the checkpoint is of other data, or of a launch that this one cannot take over: DDP and
    FSDP2 read each other's on any world, ZeRO its own stage's."""
    state, world, strategy = read_state(path), run.world, run.learner.backend.name
    run.input.stream.check_state(state["data"], path)
    moved = state["world"] != world.size
    zero = "zero" in strategy or "zero" in state["strategy"]
    if zero and strategy != state["strategy"]:
        raise UserError(
            f"{path} was saved by {state['world']} ranks of {state['strategy']}, and cannot be continued by "
            f"{world.size} ranks of {strategy}: DeepSpeed's files fit the same ZeRO stage alone; start it with the "
            "launch file that it began with (on any number of ranks), or begin anew in another --run-dir"
        )
    load(run, path)
    run.progress.start = run.progress.saved = state["step"]
    run.progress.seconds_before = state["seconds"]
    if moved:
        seed_rank(run, state["step"])


def load(run: Run, path: Path) -> None:
    """What a checkpoint of this run holds of its learner."""
    state = read_state(path)
    run.checkpoints.load(path, run.learner.backend, run.learner.pieces())
    run.spikes.resume(state["losses"])
    run.record.meter.kept_seconds = state["kept_seconds"]
    if run.learner.ema:
        run.learner.ema.num_updates = state["ema_updates"]


def seed_rank(run: Run, step: int) -> None:
    """Draws inside the model (dropout, drop path) are a rank's own; all others are keyed and need no seed."""
    entropy = (run.recipe.seed, run.world.rank, step)
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


def make_layout(recipe: Recipe, world: World) -> Layout:
    data, augment = recipe.data, recipe.augment
    return Layout(data.global_batch, world.size, data.accumulation, augment.mixup or augment.cutmix)


def check_layout(layout: Layout, strategy: str) -> None:
    """Raises UserError where the strategy cannot train on a global batch that is cut so."""
    if strategy == "deepspeed":
        layout.check_even("DeepSpeed takes micro-batches of one size (ZeRO)", UNEVEN_IS_SERVED)
    else:
        layout.check()


def make_input(recipe: Recipe, index: Index, store: Store, world: World) -> Input:
    data, augment = recipe.data, recipe.augment
    transform_class = TrainTransform if augment.decode == "exact" else FastTrainTransform
    (_, first), *later = [(begins, transform_class.of(section)) for begins, section in stages.augments(recipe)]
    train = Samples(Reader(index, data.train, store), first, recipe.seed, substitutes=True, later=later)
    seen_once = EvalTransform.of(recipe)
    validation = Samples(Reader(index, data.val, store), seen_once, recipe.seed, substitutes=False)
    shuffle = make_shuffle(recipe, index)
    plan = Plan(len(train.reader), index.fingerprint(data.train), recipe.seed, data.global_batch, shuffle)
    stream = TrainStream(train, plan, world, make_layout(recipe, world), Loading(data.workers, world.device))
    return Input(stream, DeviceAugment.of(recipe, index.num_classes), validation)


def make_shuffle(recipe: Recipe, index: Index) -> Shuffle:
    data = recipe.data
    if data.shuffle == "global":
        return GlobalShuffle()
    shard_sizes = tuple(shard.num_samples for shard in index.split(data.train).shards)
    return WindowShuffle(shard_sizes, data.runs or default_runs(data.global_batch), data.window)


def make_learner(
    recipe: Recipe,
    world: World,
    model: nn.Module,
    schedule: WarmupCosine,
    tokens: TokenStages,
    given: Input,
) -> Learner:
    section = recipe.optimizer
    names = head_names(model)
    objective = make_objective(recipe, model, given.augment.num_classes, world.device)
    groups = optim.group(model, section.layer_decay, section.decay)
    make_optimizer = functools.partial(optim.make_optimizer, section=section, groups=groups)
    backend = wrap(world, model, make_optimizer, StepOptions.of(recipe))
    ema = EMA(backend, recipe.ema_decay) if recipe.ema_decay else None
    variants: Variants = {"": nullcontext} | ({"ema_": ema.swap} if ema else {})
    evaluator = Evaluator(backend, names, variants, len(given.validation.reader))
    return Learner(backend, objective, schedule, tokens, ema, evaluator)


def make_record(recipe: Recipe, world: World, index: Index, learner: Learner) -> Record:
    data = recipe.data
    prints = {"fingerprint": index.fingerprint(data.train), "val_fingerprint": index.fingerprint(data.val)}
    setting = Setting(hardware(world.device), world.size, learner.backend.name, {"path": data.path, **prints})
    return Record(Path(recipe.run_dir), world.is_main, data.global_batch, setting)


def make_figures(recipe: Recipe, index: Index, learner: Learner) -> Figures:
    world = learner.backend.world
    peak = peak_flops(recipe, world.device)
    flops = Flops.of(recipe, index.num_classes, make_layout(recipe, world).sizes[-1]) if peak else NO_FLOPS
    return Figures(world, flops, peak, GradientNorms(learner.backend) if recipe.runtime.norms else None)


def make_telemetry(
    recipe: Recipe, index: Index, learner: Learner, given: Input, record: Record, durations: Durations
) -> Telemetry:
    profile, pictures = Profile(recipe.profile, record.run_dir, learner.backend.world), recipe.runtime.pictures
    samples = AugmentedSamples(record.picture, index.classes, durations.evaluate)
    maps = AttentionMaps(record.picture, learner.backend, given.validation)
    return Telemetry(
        make_figures(recipe, index, learner),
        profile,
        samples if pictures and record.is_main else no_samples,
        maps if pictures and has_maps(learner.backend.module) else no_maps,
    )


def make_deterministic(recipe: Recipe) -> None:
    if recipe.runtime.deterministic:
        # cuBLAS reads it when its handle is made, at the first product on the device.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(recipe.runtime.deterministic)


def _blank(run: Run) -> tuple[Tensor, Tensor]:
    """A micro-batch of the shape that the next one has, for passes that are discarded."""
    start = run.progress.start
    request = next(run.input.stream.requests(start, start + 1))
    batch, side = len(request.ids), run.input.stream.samples.image_size_at(request.epoch)
    classes = run.input.augment.num_classes
    images = torch.zeros(batch, 3, side, side, device=run.world.device)
    return images, torch.full((batch, classes), 1 / classes, device=run.world.device)
