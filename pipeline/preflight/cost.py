"""What a run would cost, as lines of the report: a title first."""

from collections.abc import Iterator

from pipeline import optim
from pipeline.footprint import STRATEGIES, Footprint, memory_of, size
from pipeline.preflight.trial import Trial
from pipeline.run import Run
from pipeline.telemetry.flops import FORWARDS_A_STEP, peak_flops

FREE = 0.1
"""The share of a device's memory that is left to what no estimate knows: fragments, libraries, the augmentation."""


def memory(run: Run, footprint: Footprint, activations: int) -> Iterator[str]:
    """activations: bytes of a micro-batch."""
    world, mine = run.world, run.learner.backend.name
    there = memory_of(world.device, world.size // world.nodes)
    yield f"memory a rank: an estimate from shapes; {size(there)} a {world.device.type} rank are there"
    yield f"activations of a micro-batch: {size(activations)}"
    if beside := run.learner.criterion.num_bytes:
        activations += beside
        yield f"clusters of the bottleneck, added to activations below: {size(beside)}"
    for strategy in possible(run):
        held = footprint.held(strategy, world.size)
        parts = ("weights", "gradients", "states", "averages", "passing")
        listed = ", ".join(f"{name} {size(getattr(held, name))}" for name in parts)
        chosen = " (this launch)" if strategy == mine else ""
        yield f"{strategy}{chosen}: {size(held.total + activations)} = {listed}, activations"
    yield recommended(footprint, possible(run), world.size, activations, there)


def possible(run: Run) -> list[str]:
    """The strategies that this number of ranks, the optimizer and the precision leave."""
    if run.world.size == 1:
        return [run.learner.backend.name]
    backends = optim.table.find(run.recipe.optimizer.name).backends
    if run.recipe.runtime.precision == "fp16":
        backends = ("ddp",)
    return [name for name in STRATEGIES if ("deepspeed" if name.startswith("zero") else name) in backends]


def recommended(footprint: Footprint, strategies: list[str], ranks: int, activations: int, there: int) -> str:
    """The first strategy, of which each sends more than the one before, that leaves FREE of the memory."""
    for strategy in strategies:
        if footprint.held(strategy, ranks).total + activations <= (1 - FREE) * there:
            return f"recommended: {strategy}, the first that leaves {FREE:.0%} of it free"
    return (
        f"recommended: none of {', '.join(strategies)} leaves {FREE:.0%} of it free: raise --data.accumulation or "
        "--runtime.activation-checkpointing for the activations, or take more ranks for the rest"
    )


def speed(run: Run, trial: Trial) -> Iterator[str]:
    batch = run.recipe.data.global_batch
    loaded, taken = batch / trial.load_seconds, batch / trial.step_seconds
    yield "speed: measured on this launch, each alone"
    seconds = f"{trial.step_seconds:.3f} s a step"
    if len(trial.stages) > 1:
        yield "the stages that are left, of which the figures below are means:"
        for stage in trial.stages:
            yield (
                f"{stage.number} steps of {stage.step_seconds:.3f} s, with images of {stage.image_size} px, which come "
                f"in {stage.load_seconds:.3f} s"
            )
    yield f"the loader brings {loaded:,.0f} images/s, steps take {taken:,.0f} images/s ({seconds})"
    yield verdict(loaded, taken)
    if trial.peak:
        yield f"tensors took {size(trial.peak)} of a GPU at most"


def verdict(loaded: float, taken: float) -> str:
    """Both in images a second."""
    if loaded < taken:
        return (
            f"decode-bound by {taken / loaded:.1f}x: give more --data.workers where there are cores, --augment.decode "
            "fast, or smaller images in the shards"
        )
    return f"the loader keeps up: it brings {loaded / taken:.1f}x what steps take"


def whole(run: Run, trial: Trial, flops: float) -> Iterator[str]:
    """flops: of an image's forward pass, on average over what is left."""
    left = run.durations.total - run.progress.start
    images, seconds = left * run.recipe.data.global_batch, trial.seconds
    step = FORWARDS_A_STEP * flops
    yield f"the whole run: {left} steps, without evaluations and checkpoints"
    yield f"{images:,} images x {step / 1e9:.4g} GFLOP ({FORWARDS_A_STEP} forward passes) = {images * step:.3e} FLOP"
    unit = "GPU hours" if run.world.device.type == "cuda" else "hours of ranks"
    yield f"{seconds / 3600:.2f} hours x {run.world.size} ranks = {seconds / 3600 * run.world.size:.2f} {unit}"
    peak = peak_flops(run.recipe, run.world.device)
    if peak:
        rate = run.recipe.data.global_batch / trial.step_seconds / run.world.size
        yield f"MFU of steps alone: {rate * step / peak:.1%} of {peak / 1e12:,.4g} TFLOP/s"


def disk(run: Run, footprint: Footprint, free: int) -> Iterator[str]:
    """free: bytes on the disk of the run directory."""
    section = run.recipe.checkpoint
    name = run.learner.backend.name
    one, most = footprint.checkpoint(name), footprint.disk(name)
    yield f"disk: {size(most)} at most, {size(free)} are free"
    yield f"{section.keep} + 1 checkpoints of {size(one)}, and {size(footprint.weights())} of weights at the end"
    if free < most:
        yield f"not enough for all of it: make room, or keep fewer checkpoints (--checkpoint.keep, now {section.keep})"
