"""What a run is: a frozen Recipe of typed sections, and the command line that overrides its fields."""

from pipeline.recipe.bottleneck import Bottleneck
from pipeline.recipe.command_line import parse
from pipeline.recipe.files import with_text
from pipeline.recipe.leaves import flatten, unflatten
from pipeline.recipe.model import Model
from pipeline.recipe.progressive import Progressive
from pipeline.recipe.sections import (
    Augment,
    Checkpoint,
    Data,
    Evaluation,
    Optimizer,
    Recipe,
    Runtime,
    Schedule,
    Shampoo,
)
from pipeline.recipe.sources import sources
from pipeline.recipe.token_expansion import TokenExpansion

__all__ = [
    "Augment",
    "Bottleneck",
    "Checkpoint",
    "Data",
    "Evaluation",
    "Model",
    "Optimizer",
    "Progressive",
    "Recipe",
    "Runtime",
    "Schedule",
    "Shampoo",
    "TokenExpansion",
    "flatten",
    "parse",
    "sources",
    "unflatten",
    "with_text",
]
