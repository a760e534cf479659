"""The model of a recipe as it is trained at each of its stages."""

import torch
from torch import Tensor, nn

from pipeline.models.build import make_model
from pipeline.models.toe import TokenStages
from pipeline.recipe import Recipe
from pipeline.recipe.stages import begins, image_size_at
from shards.errors import UserError


def on_meta(recipe: Recipe, num_classes: int, batch: int, epoch: int | None = None) -> tuple[nn.Module, Tensor]:
    """The model on meta, and what it is trained on in an epoch, [batch, 3, S, S]; None: on all tokens of the images
    that it is evaluated on."""
    side = recipe.augment.image_size if epoch is None else image_size_at(recipe, epoch)
    with torch.device("meta"):
        model, images = make_model(recipe, num_classes), torch.empty(batch, 3, side, side)
    if epoch is not None:
        TokenStages.of(recipe.token_expansion, model, batches_per_epoch=1)(epoch)
    return model, images


def check_image_sizes(recipe: Recipe) -> None:
    """Raises UserError where the model does not take the images of one of the stages. Nothing is computed."""
    for epoch in begins(recipe) if recipe.progressive.image_sizes else ():
        model, images = on_meta(recipe, 1, 2, epoch)
        try:
            model(images)
        except (UserError, AssertionError) as error:  # the latter are timm's
            raise UserError(
                f"progressive.image_sizes {recipe.progressive.image_sizes}: model.name '{recipe.model.name}' cannot be "
                f"trained on images of {images.shape[-1]} pixels: {str(error).rstrip('.')}; give other sizes, or leave "
                "them empty"
            ) from error
