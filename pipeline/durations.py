"""How long a run is, and when it does what, in optimizer steps."""

from dataclasses import dataclass

from pipeline.optim import WarmupCosine
from pipeline.recipe import Recipe
from pipeline.validate import num_steps
from shards.errors import UserError


@dataclass(frozen=True)
class Durations:
    """The recipe's durations in optimizer steps."""

    total: int
    log: int
    save: int
    evaluate: int


def make_schedule(recipe: Recipe, batches_per_epoch: int) -> tuple[WarmupCosine, Durations]:
    """Raises UserError where warm-up and cool-down leave nothing of the training between them, or a cool-down has a
    rate without a length or a length without a rate."""
    section, global_batch = recipe.schedule, recipe.data.global_batch
    total = num_steps(section.length, batches_per_epoch, global_batch)
    warmup = num_steps(section.warmup, batches_per_epoch, global_batch, total)
    cooldown = num_steps(section.cooldown, batches_per_epoch, global_batch, total)
    if total < 1 or warmup + cooldown >= total:
        cooling = f" and schedule.cooldown '{section.cooldown}' {cooldown}" if cooldown else ""
        raise UserError(
            f"schedule.warmup '{section.warmup}' is {warmup} steps{cooling}, but schedule.length '{section.length}' is "
            f"only {total} ({batches_per_epoch} steps an epoch): the learning rate would never be reached; train "
            f"longer or warm up {'or cool down ' if cooldown else ''}less"
        )
    if section.cooldown_lr and not cooldown:
        raise UserError(
            f"schedule.cooldown_lr {section.cooldown_lr} would never be reached: schedule.cooldown "
            f"'{section.cooldown}' is 0 steps; give it a length, or leave the rate at 0"
        )
    if cooldown and not section.cooldown_lr:
        raise UserError(
            f"schedule.cooldown '{section.cooldown}' is {cooldown} steps at schedule.cooldown_lr 0, in which nothing "
            "would be learnt: give it a rate, or leave it out"
        )

    def steps(duration: str) -> int:
        return max(1, num_steps(duration, batches_per_epoch, global_batch, total))

    durations = Durations(
        total, steps(recipe.runtime.log_every), steps(recipe.checkpoint.every), steps(recipe.evaluation.every)
    )
    hold = batches_per_epoch if section.cosine_per == "epoch" else 1
    rates, cooldown_lr = (section.lr, section.warmup_lr, section.min_lr), section.cooldown_lr if cooldown else None
    return WarmupCosine(*rates, warmup, total - cooldown, hold, cooldown_lr), durations
