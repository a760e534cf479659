"""What T2T-ViT costs is what its authors' tables say: parameters, and products with and without those of attention."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import pipeline.models  # noqa: F401 - fills the registry

# name: millions of trained parameters, GMACs at 224 px of linear layers alone (the table's own), and with attention
COST = {
    "t2t_vit_7": (4.256, 0.976, 1.147),
    "t2t_vit_10": (5.835, 1.285, 1.516),
    "t2t_vit_12": (6.887, 1.492, 1.763),
    "t2t_vit_14": (21.466, 4.334, 4.783),
    "t2t_vit_19": (39.085, 7.787, 8.480),
    "t2t_vit_24": (64.001, 12.676, 13.662),
    "t2t_vit_t_14": (21.465, 4.334, 6.089),
    "t2t_vit_t_19": (39.085, 7.787, 9.785),
    "t2t_vit_t_24": (64.001, 12.676, 14.967),
}


def _linear_macs(model: torch.nn.Module, images: torch.Tensor) -> int:
    """Products of weights of linear layers, by hooks."""
    found = []

    def count(layer: torch.nn.Linear, given: tuple[torch.Tensor], made: torch.Tensor) -> None:
        found.append(made.numel() * layer.in_features)

    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(count)
    model(images)
    return sum(found)


@pytest.mark.parametrize("name", COST)
def test_parameters_and_macs(name):
    with torch.device("meta"):
        model, images = timm.create_model(name).eval(), torch.zeros(1, 3, 224, 224)
    millions, linear, whole = COST[name]
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 3) == millions
    with FlopCounterMode(display=False) as counter:
        model(images)
    found = _linear_macs(model, images) / 1e9, counter.get_total_flops() / 2e9
    print(f"{name}: {found[0]:.3f} GMACs of linear layers, {found[1]:.3f} with attention")
    assert found == pytest.approx((linear, whole), rel=1e-3)
