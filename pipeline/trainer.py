"""fit(): the training loop.

A checkpoint of a step is taken before the evaluation of that step; a run that resumes there evaluates first.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from safetensors.torch import save as as_safetensors

from pipeline.backend import Stepped, Stopped, World
from pipeline.checkpoint import saved_step
from pipeline.data.batch import Batch
from pipeline.data.stream import evaluation_batches
from pipeline.launch import launch
from pipeline.launch import leave as leave
from pipeline.preflight import dry_run
from pipeline.prepare import load, prepare
from pipeline.recipe import Recipe, flatten
from pipeline.record import forget_outcome, weights_path, write_outcome
from pipeline.run import Run
from shards.crop import has_crop_decode
from shards.durable import atomic_file

WHOLE_IMAGES = (
    "augment.decode fast decodes whole images here, to the same pixels, more slowly: crop decoding was not built; "
    "install libjpeg-turbo's headers (Debian: libjpeg62-turbo-dev) and this package again"
)


def fit(recipe: Recipe, world: World) -> str:
    """Trains the recipe to its end, from its newest checkpoint where there is one; "done", or "requeue" when stopped.
    A dry run is done before the first step, and leaves no outcome.

    Raises UserError before the first step for whatever cannot work.
    """
    if world.is_main and not recipe.dry_run:
        forget_outcome(Path(recipe.run_dir))
    world.place.unsaved = False
    try:
        run = prepare(recipe, world)
    except Stopped:
        return "requeue" if recipe.dry_run else requeue(world, Path(recipe.run_dir), saved_step(Path(recipe.run_dir)))
    if world.is_main:
        print(describe(run), flush=True)
    outcome = dry_run(run) if recipe.dry_run else train(run)
    run.learner.backend.close()
    return outcome


def describe(run: Run) -> str:
    """What is trained, where, on how much, in which order, and from where on."""
    recipe, world, plan, backend = run.recipe, run.world, run.input.stream.plan, run.learner.backend
    return (
        f"{recipe.model.name}: {backend.num_parameters() / 1e6:.2f} M parameters in {recipe.runtime.precision}, "
        f"{backend.name} on {world.size} x {world.device.type}; {plan.num_samples:,} samples; a step takes "
        f"{run.input.stream.layout.describe()}; steps {run.progress.start} to {run.durations.total}, "
        f"{plan.batches_per_epoch} an epoch\n"
        f"{run.input.stream.describe()}"
        + ("" if recipe.augment.decode == "exact" or has_crop_decode() else f"\n{WHOLE_IMAGES}")
    )


def train(run: Run) -> str:
    """The loop. Each rank runs it in step with the others."""
    learner, every, total = run.learner, run.durations, run.durations.total
    start = run.progress.start
    streaming = run.input.stream.open(start, total)
    with run.record.open(start, total), run.checkpoints.settled(), run.telemetry.profile.open(), streaming as batches:
        if due(start, every.evaluate, total) and not evaluate(run, start):
            return stop(run, start)
        for step in range(start, total):
            micro_batches = fetch(run, batches, step + 1) if look(run, step) else None
            if micro_batches is None:
                return stop(run, step)
            learner.tokens(step)
            learner.backend.set_lr(learner.schedule(step))
            mixed, done = [run.input.augment(batch) for batch in micro_batches], step + 1
            run.telemetry.samples(done, mixed[0])
            stepped = learner.backend.step(learner.criterion, mixed)
            kept = settle(run, done, stepped, micro_batches)
            run.record.step(done, kept)
            run.telemetry.profile.step()
            if due(done, every.log, total) and stepped.applied:
                log(run, done, stepped)
            if due(done, every.save, total):
                save(run, done)
            if due(done, every.evaluate, total) and not evaluate(run, done):
                return stop(run, done)
        return finish(run)


def look(run: Run, step: int) -> bool:
    """At what the loss has to know of the training samples before `step`; False where a rank was told to stop."""
    with run.record.meter.paused():
        return run.bottleneck(step)


def fetch(run: Run, batches: Iterator[list[Batch]], step: int) -> list[Batch] | None:
    """This rank's micro-batches of `step`; None, on every rank, where one was signalled to stop.

    The ranks agree once each has its data, or the signal that ends its wait: launchers send it to all of them."""
    run.world.place.at(f"step {step}: waiting for data")
    with run.record.meter.waiting():
        found = run.world.stop.wait_for(lambda: next(batches))
    run.world.place.at(f"step {step}: training")
    run.quarantine.note(found or [], step)
    return None if run.quarantine.poll() else found


def settle(run: Run, done: int, stepped: Stepped, batches: Sequence[Batch]) -> bool:
    """The average follows a sound step; one that is not finite is passed over; one whose loss leaps up takes the run
    back to its newest checkpoint, if there is one, and on with the batches after this one. Whether the step stays.

    Raises UserError where that happens more often than the recipe allows.
    """
    run.world.place.unsaved = True
    if not stepped.applied:
        run.skips.note(done, stepped, batches, "the weights stay as they were")
    elif run.spikes.met(stepped.loss.item()) and take_back(run, done, stepped, batches):
        return False
    elif run.learner.ema:
        run.learner.ema.update()
    return stepped.applied


def take_back(run: Run, done: int, stepped: Stepped, batches: Sequence[Batch]) -> bool:
    """Notes a spike, and loads the newest checkpoint; False where there is none."""
    run.checkpoints.wait()
    path = run.checkpoints.newest()
    back = f"the weights are those of {path.name} again" if path else "there is no checkpoint yet, the run goes on"
    run.skips.note(done, stepped, batches, f"a spike, above {run.spikes.limit():.4g}: {back}")
    if path is None:
        return False
    load(run, path)
    return True


def due(step: int, every: int, total: int) -> bool:
    """Whether what happens every `every` steps, and at the end, happens after `step` of them."""
    return step > 0 and (step % every == 0 or step == total)


def log(run: Run, done: int, stepped: Stepped) -> None:
    """One line of metrics."""
    values = {
        "epoch": done / run.input.stream.plan.batches_per_epoch,
        "loss": stepped.loss.item(),
        "lr": run.learner.schedule(done - 1),
        "grad_norm": stepped.grad_norm.item(),
    }
    run.record.metrics(done, values, run.telemetry.figures)


def evaluate(run: Run, done: int) -> bool:
    """Evaluates into the record; False where a rank was told to stop before the end of it."""
    samples, batch, loading = run.input.validation, run.recipe.evaluation.batch, run.input.stream.loading
    with run.record.meter.paused(), evaluation_batches(samples, batch, run.world, loading) as batches:
        watched = run.record.watch(batches, len(samples.reader) / run.world.size / batch)
        values = run.learner.evaluator(run.quarantine.watch(watched, done))
    if values is None:
        return False
    run.quarantine.poll()
    better = run.best.add(done, values)
    run.record.evaluation(done, run.recipe.data.val, values | run.best.steps())
    with run.record.meter.paused():
        run.telemetry.maps(done)
    for name, score in better.items():
        # One key, for safetensors writes several in any order.
        export(run, name, f"best_{name}", {"best": json.dumps({"step": score.step, score.metric: score.value})})
    return True


def save(run: Run, done: int) -> None:
    """Saves a checkpoint of `done` steps, unless there is one, or the last step was skipped: where training has
    diverged, sound checkpoints would be pruned for useless ones. It may be committed behind the steps that follow."""
    if done in (run.progress.saved, run.skips.latest):
        return
    run.world.place.at(f"step {done}: saving a checkpoint")
    began = time.perf_counter()
    run.record.flush()
    state = {
        "data": run.input.stream.state(done),
        "ema_updates": run.learner.ema.num_updates if run.learner.ema else 0,
        "losses": list(run.spikes.losses),
        "seconds": run.progress.seconds(),
        "kept_seconds": run.record.meter.kept_seconds,
        "world": run.world.size,
        "strategy": run.learner.backend.name,
        "commit": run.progress.commit,
        "recipe": flatten(run.recipe),
    }
    run.checkpoints.save(done, run.learner.backend, run.learner.pieces(), state)
    run.progress.saved = done
    seconds = time.perf_counter() - began
    run.progress.save_seconds += seconds
    run.record.saved(done, seconds)


def stop(run: Run, done: int) -> str:
    """Saves, and asks to be started again."""
    if done:
        save(run, done)
    run.checkpoints.wait()
    return requeue(run.world, run.run_dir, done)


def requeue(world: World, run_dir: Path, done: int) -> str:
    if world.is_main:
        write_outcome(run_dir, "requeue", done, "a signal asked the run to stop; start it again to go on")
    return "requeue"


def finish(run: Run) -> str:
    """Writes the weights to hand over, and the outcome."""
    run.world.place.at("writing the weights")
    for name in ("model", "ema") if run.learner.ema else ("model",):
        export(run, name, name, {"format": "pt"})
    run.checkpoints.wait()
    run.checkpoints.wait_for_uploads()
    if run.world.is_main:
        images = run.durations.total * run.recipe.data.global_batch
        reason = f"trained for {run.recipe.schedule.length}"
        spent = {"seconds": run.progress.seconds(), "save_seconds": run.progress.save_seconds}
        write_outcome(run.run_dir, "done", run.durations.total, reason, images=images, **spent)
    run.world.barrier()
    return "done"


def export(run: Run, variant: str, name: str, metadata: dict[str, str]) -> None:
    """RUN/weights/NAME.safetensors: the whole model, as timm names its weights, or its average (variant "ema")."""
    with run.learner.ema.swap() if variant == "ema" and run.learner.ema else nullcontext():
        weights = run.learner.backend.full_weights()
        if run.world.is_main:  # within: the weights may share the memory of the model
            path = weights_path(run.run_dir, name)
            path.parent.mkdir(exist_ok=True)
            with atomic_file(path) as file:
                file.write(as_safetensors({key: tensor.contiguous() for key, tensor in weights.items()}, metadata))


def run(recipe: Recipe) -> NoReturn:
    """The main of a recipe file: trains it and exits with its outcome's code."""
    launch(lambda world: fit(recipe, world), recipe.runtime, Path(recipe.run_dir), recipe.dry_run)
