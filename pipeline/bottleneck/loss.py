"""The criterion."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.backend.base import Criterion
from pipeline.bottleneck.tap import Tap
from pipeline.loss import Objective, SummedOverHeads
from pipeline.models.ltm_loss import ib_bound, soft_assign
from pipeline.recipe import Recipe
from pipeline.sharded import Shard


class Sizes(NamedTuple):
    """K, 3 H W and C."""

    centroids: int
    pixels: int
    classes: int


class BottleneckLoss:
    """criterion(outputs, targets): `plain` at first, then, while `is_on`, cross-entropy of whole labels and `weight`
    times the bound of `pipeline.models.ltm_loss`, against what was found of the epoch:

    pixels (K, 3 H W) and features (K, D): centroids of length 1; profile (K, C): Q. Zeros until they are found.
    """

    def __init__(self, plain: Criterion, tap: Tap, weight: float, sizes: Sizes, device: torch.device) -> None:
        self.plain = plain
        self.tap = tap
        self.weight = weight
        self.is_on = False
        self.pixels = torch.zeros(sizes.centroids, sizes.pixels, device=device)
        self.features = torch.zeros(sizes.centroids, tap.num_features, device=device)
        self.profile = torch.zeros(sizes.centroids, sizes.classes, device=device)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """outputs: logits [B, C]; targets: [B, C], of one label each, which may be smoothed."""
        images, features = self.tap.take()
        if not self.is_on:
            return self.plain(outputs, targets)
        labels = targets.argmax(dim=1)
        with torch.no_grad():
            phi_x = soft_assign(images.flatten(1), self.pixels)
        bound = ib_bound(soft_assign(features, self.features), phi_x, self.profile, labels)
        return F.cross_entropy(outputs.float(), labels) + self.weight * bound

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.pixels, self.features, self.profile))

    def state(self) -> list[Shard]:
        """What a run that is continued in the middle of an epoch cannot find again; it is loaded in place."""
        kept = {"features": self.features, "profile": self.profile}
        return [Shard(name, tensor.view(-1), 0, tensor.numel()) for name, tensor in kept.items()]


def make_objective(recipe: Recipe, model: nn.Module, num_classes: int, device: torch.device) -> Objective:
    """What a recipe trains its model to, which is not wrapped yet. Raises UserError as `Tap` does."""
    plain, section = SummedOverHeads(recipe.loss), recipe.bottleneck
    if not section.weight:
        return plain
    sizes = Sizes(section.centroids, 3 * recipe.augment.image_size**2, num_classes)
    return BottleneckLoss(plain, Tap(model), section.weight, sizes, device)
