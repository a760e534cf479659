"""The stages of a recipe: what changes in the course of a training, always where an epoch begins."""

from dataclasses import replace
from itertools import pairwise

from pipeline.recipe.sections import Augment, Recipe
from shards.errors import UserError

STAGED = ("token_expansion", "progressive")
"""Sections whose `steps` are epochs that begin stages."""


def augments(recipe: Recipe) -> tuple[tuple[int, Augment], ...]:
    """The augmentation of each stage, after the epoch that it begins with; of a recipe without stages its own, from
    epoch 0 on."""
    section, own = recipe.progressive, recipe.augment
    sizes = section.image_sizes or (own.image_size,) * len(section.steps)
    magnitudes = section.randaugment_magnitudes or (own.randaugment_magnitude,) * len(section.steps)
    found = tuple(
        (epoch, replace(own, image_size=side, randaugment_magnitude=magnitude))
        for epoch, side, magnitude in zip(section.steps, sizes, magnitudes, strict=True)
    )
    return found or ((0, own),)


def image_size_at(recipe: Recipe, epoch: int) -> int:
    """Side of the training images of an epoch."""
    return [section.image_size for begins, section in augments(recipe) if begins <= epoch][-1]


def begins(recipe: Recipe) -> tuple[int, ...]:
    """Epochs from which on a step is another amount of work, as images are larger or tokens more; the first is 0."""
    sides = [(epoch, section.image_size) for epoch, section in augments(recipe)]
    larger = [epoch for (_, before), (epoch, side) in pairwise(sides) if side != before]
    return tuple(sorted({0, *larger, *recipe.token_expansion.steps}))


def parts(recipe: Recipe, batches_per_epoch: int, start: int, total: int) -> list[tuple[int, int]]:
    """The steps from `start` to `total`, as (first step, number of steps) of each stretch of equal work."""
    bounds = [epoch * batches_per_epoch for epoch in begins(recipe)]
    bounds = [start, *(step for step in bounds if start < step < total), total]
    return [(first, last - first) for first, last in pairwise(bounds)]


def check_begun(recipe: Recipe, batches_per_epoch: int, total: int) -> None:
    """Raises UserError where a training of `total` steps ends before the last stage begins."""
    for name in STAGED:
        steps: tuple[int, ...] = getattr(recipe, name).steps
        if steps and steps[-1] * batches_per_epoch >= total:
            raise UserError(
                f"{name}.steps {steps}: the stage of epoch {steps[-1]} would never begin, as schedule.length is "
                f"{total} steps, {batches_per_epoch} an epoch: train longer, or begin it earlier"
            )
