"""What a run would do, as lines of the report: a title first."""

from collections.abc import Iterator

from torch import nn

from pipeline import optim
from pipeline.footprint import size
from pipeline.recipe import Recipe, flatten, sources
from pipeline.run import Run

POINTS = 10


def recipe(recipe: Recipe) -> Iterator[str]:
    yield "recipe: every field, and where its value comes from"
    values, origin = flatten(recipe), sources(recipe)
    widths = max(map(len, values)), max(len(_text(value)) for value in values.values())
    for name, value in values.items():
        yield f"{name:<{widths[0]}}  {_text(value):<{widths[1]}}  {origin[name]}"


def parameters(run: Run, model: nn.Module) -> Iterator[str]:
    """model: whole, on any device."""
    section = run.recipe.optimizer
    split = optim.table.find(section.name).split_hidden
    groups = optim.group(model, section.layer_decay, section.decay).bind(model, split)
    fixed = sum(each.numel() for each in model.parameters() if not each.requires_grad)
    trained = sum(each.numel() for group in groups for each in group["params"])
    yield f"parameters: {trained:,} trained in {len(groups)} groups, {fixed:,} fixed; {section.name}"
    for number, group in enumerate(groups):
        decay = group.get("weight_decay", section.weight_decay)
        rest = "" if "use_fallback" not in group else ", by AdamW" if group["use_fallback"] else ", hidden weights"
        yield (
            f"group {number}: {len(group['params'])} tensors, {sum(each.numel() for each in group['params']):,} "
            f"parameters, learning rate x {group['lr_scale']:.4g}, weight decay {decay}{rest}"
        )


def learning_rate(run: Run) -> Iterator[str]:
    total, schedule = run.durations.total, run.learner.schedule
    held = f", moved every {schedule.hold_steps} steps (an epoch)" if run.recipe.schedule.cosine_per == "epoch" else ""
    last = total - schedule.total_steps
    cooled = f", then {last} steps at {schedule.cooldown_lr:.4e}" if last else ""
    yield (
        f"learning rate: {schedule.warmup_steps} steps of warm-up, then half a cosine to step {schedule.total_steps}"
        f"{held}{cooled}"
    )
    for step in points(total):
        yield f"step {step + 1:>{len(str(total))}}  {schedule(step):.4e}"


def points(total: int) -> list[int]:
    """Up to ten steps, counted from 0, evenly from the first to the last."""
    return sorted({round(number * (total - 1) / (POINTS - 1)) for number in range(POINTS)})


def batches(run: Run) -> Iterator[str]:
    stream, total, start = run.input.stream, run.durations.total, run.progress.start
    plan = stream.plan
    yield f"global batch: {stream.layout.describe()} samples"
    left = plan.num_samples - plan.batches_per_epoch * plan.global_batch
    yield f"{plan.num_samples:,} samples make {plan.batches_per_epoch} steps an epoch, and {left} are left out of each"
    begun = f", of which {start} are done" if start else ""
    yield f"{total} steps{begun}: {total / plan.batches_per_epoch:.2f} epochs, {total * plan.global_batch:,} images"
    every = run.durations
    yield f"every {every.log} steps a line, {every.save} a checkpoint, {every.evaluate} an evaluation"


def data(run: Run, num_cores: int) -> Iterator[str]:
    """num_cores: of this machine."""
    stream, here = run.input.stream, run.world.size // run.world.nodes
    index, section = stream.samples.reader.index, run.recipe.data
    yield f"data: {section.path}"
    for name in (section.train, section.val):
        split = index.split(name)
        each = split.num_bytes / len(split.shards)
        yield f"{name}: {split.num_samples:,} samples in {len(split.shards)} shards of about {size(each)}"
    yield stream.describe()
    yield workers(section.workers, here, num_cores)


def workers(number: int, ranks: int, num_cores: int) -> str:
    """number: of a rank; ranks and cores of one machine."""
    processes = ranks * (number + 1)
    found = f"{number} workers a rank: {ranks} ranks with theirs are {processes} processes on {num_cores} cores here"
    if processes <= num_cores:
        return found
    return f"{found}, and wait for one another: {max(0, num_cores // ranks - 1)} workers a rank leave each rank a core"


def _text(value: object) -> str:
    return repr(value) if value == "" else str(value)
