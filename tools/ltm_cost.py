"""What LTM costs at compression ratio 0.8, measured, beside its base and the figures that LTM's authors publish.

`python tools/ltm_cost.py`: parameters, and multiplications with additions (MACs) of one image's forward pass, counted
on models of no memory: MobileViT those of linear layers and convolutions alone, the others with attention's and the
mask's products too, as which the authors' figures of the bases are nearest to ours. Nothing that is marked as the
authors' is measured here.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.models.ltm.sizes import BASES
from pipeline.models.stages import on_meta
from pipeline.recipe import Augment, Model, Recipe
from pipeline.telemetry.flops import forward_flops

NUM_CLASSES, RATIO = 1000, 0.8
BATCH = 2  # norms of a batch take no single image


@dataclass(frozen=True)
class Authors:
    """A row of the authors' table: millions of parameters, GMACs ("FLOPs" there), top-1 in percent."""

    model: str
    millions: float
    gmacs: float
    top1: float


TABLE = {
    ("ltm_mobilevit_xs", 224): (
        Authors("MobileViT-XS", 2.3, 0.7, 74.8),
        Authors("ToMe-MobileViT-XS", 2.3, 0.54, 72.7),
        Authors("ToFu-MobileViT-XS", 2.3, 0.54, 73.3),
        Authors("LTMP-MobileViT-XS", 2.3, 0.56, 73.9),
        Authors("LTM-MobileViT-XS", 2.3, 0.52, 75.8),
    ),
    ("ltm_mobilevit_s", 224): (
        Authors("MobileViT-S", 5.6, 1.4, 78.4),
        Authors("ToMe-MobileViT-S", 5.6, 1.22, 76.7),
        Authors("ToFu-MobileViT-S", 5.6, 1.22, 77.2),
        Authors("LTMP-MobileViT-S", 5.6, 1.26, 77.5),
        Authors("LTM-MobileViT-S", 5.6, 1.17, 79.7),
    ),
    ("ltm_efficientvit_b1", 224): (
        Authors("EfficientViT-B1 [r224]", 9.1, 0.52, 79.4),
        Authors("S2ViTE-EfficientViT-B1 [r224]", 8.2, 0.47, 79.0),
        Authors("SPViT-EfficientViT-B1 [r224]", 9.2, 0.49, 79.3),
        Authors("SAViT-EfficientViT-B1 [r224]", 8.4, 0.47, 79.2),
        Authors("ToMe-EfficientViT-B1 [r224]", 9.1, 0.47, 78.8),
        Authors("ToFu-EfficientViT-B1 [r224]", 9.1, 0.47, 79.0),
        Authors("LTMP-EfficientViT-B1 [r224]", 9.1, 0.50, 79.2),
        Authors("LTM-EfficientViT-B1 [r224]", 9.1, 0.44, 80.2),
    ),
    ("ltm_efficientvit_b1", 288): (
        Authors("EfficientViT-B1 [r288]", 9.1, 0.86, 80.4),
        Authors("ToMe-EfficientViT-B1 [r288]", 9.1, 0.73, 79.7),
        Authors("ToFu-EfficientViT-B1 [r288]", 9.1, 0.73, 79.8),
        Authors("LTMP-EfficientViT-B1 [r288]", 9.1, 0.76, 80.0),
        Authors("LTM-EfficientViT-B1 [r288]", 9.1, 0.70, 81.0),
    ),
    ("ltm_vit_small", 224): (Authors("ViT-S", 22.1, 4.3, 81.2), Authors("LTM-ViT-S", 22.1, 3.7, 81.8)),
    ("ltm_vit_base", 224): (Authors("ViT-B", 86.5, 17.6, 83.7), Authors("LTM-ViT-B", 86.5, 12.9, 83.9)),
    ("ltm_swin_tiny", 224): (Authors("Swin-T", 29.0, 4.5, 81.3), Authors("LTM-Swin-T", 29.0, 3.8, 81.8)),
    ("ltm_swin_base", 224): (Authors("Swin-B", 88.0, 15.4, 83.5), Authors("LTM-Swin-B", 88.0, 12.0, 83.8)),
}
"""By our model and pixels: the base first and LTM last, other methods between them."""

WHY = """\
Why ours differ from the authors' LTM, whose block is not public, so that ours is a design of this project:
ViT: every block hands on 0.8 of its tokens, so that of 196 the twelfth gets 19. Were they un-merged in every block, the
  MLPs alone would have fewer, 20 % of two thirds: by arithmetic, 3.7 of ViT-S's 4.24 G of linear layers.
Swin, MobileViT, EfficientViT: every position of the map is left, so that attention and convolutions see all of them,
  and only the MLPs (of EfficientViT, two 1x1 convolutions) have fewer tokens; and the cosines of the mask are products
  too, which the count of MobileViT, of layers alone, leaves out."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    print(f"{'':<40}{'params M':>10}{'MACs G':>9}{'top-1 %':>9}  from")
    for (name, side), rows in TABLE.items():
        _print_model(name, side, rows)
    print(WHY)
    return 0


def _print_model(name: str, side: int, rows: Sequence[Authors]) -> None:
    costs = [cost(name, side, ratio) for ratio in (1, RATIO)]
    for model, (millions, gmacs) in zip((BASES[name], name), costs, strict=True):
        print(f"{f'{model} at {side} px':<40}{millions:>10.3f}{gmacs:>9.3f}{'':>9}  measured here")
    for row in rows:
        print(f"{row.model:<40}{row.millions:>10.1f}{row.gmacs:>9.2f}{row.top1:>9.1f}  the authors' table")
    (_, base), (_, ours) = costs
    theirs = rows[-1].gmacs
    shares = f"{ours / base:.2f} of its base here, {theirs / rows[0].gmacs:.2f} in the table"
    print(f"LTM has {shares}: {ours - theirs:+.2f} G from theirs.\n")


def cost(name: str, side: int, ratio: float) -> tuple[float, float]:
    """Millions of parameters, and GMACs as the table counts them, at a compression ratio; 1 is the base."""
    recipe = Recipe(augment=Augment(image_size=side), model=Model(name=name, compression_ratio=ratio))
    model, images = on_meta(recipe, NUM_CLASSES, BATCH)
    macs = layer_macs(model, images) if "mobilevit" in name else forward_flops(recipe, NUM_CLASSES, BATCH) / 2
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6, macs / 1e9


@torch.no_grad()
def layer_macs(model: nn.Module, images: torch.Tensor) -> float:
    """Of one image, those of linear layers and convolutions alone."""
    found: list[int] = []

    def count(layer: nn.Module, given: object, made: torch.Tensor) -> None:
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        found.append(made.numel() * layer.weight[0].numel())

    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(count)
    model(images)
    return sum(found) / len(images)


if __name__ == "__main__":
    sys.exit(main())
