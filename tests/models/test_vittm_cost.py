"""ViTTM costs what the reference costs, less the parameters which that never uses, and less products on a CPU."""

import warnings

import pytest
import timm
import torch

with warnings.catch_warnings():  # fvcore scripts a loss of its own when imported
    warnings.simplefilter("ignore", DeprecationWarning)
    from fvcore.nn import FlopCountAnalysis

import pipeline.models  # noqa: F401 - fills the registry

# name: millions of parameters at 1000 classes, what 10450 classes add, GMACs without fused attention
COST = {
    "vittm_tiny": (7.997, 3.65, 0.497),
    "vittm_small": (29.263, 7.28, 1.843),
    "vittm_base": (111.608, 14.53, 7.084),
    "vittm_large": (384.985, 19.37, 24.619),
}


def _millions(name: str, num_classes: int) -> float:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=num_classes)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


@pytest.mark.parametrize("name", COST)
def test_parameters(name):
    few, added, _ = COST[name]
    assert round(_millions(name, 1000), 3) == few
    assert round(_millions(name, 10450) - _millions(name, 1000), 2) == added


@pytest.mark.parametrize("name", COST)
def test_macs(name):
    with torch.device("meta"):
        model = timm.create_model(name, eval_head="both").eval()
    model.to_empty(device="cpu")
    count = FlopCountAnalysis(model, torch.zeros(1, 3, 224, 224))
    count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    assert 0.9 * COST[name][2] < count.total() / 1e9 < 0.95 * COST[name][2]
    assert count.unsupported_ops()["aten::scaled_dot_product_attention"] == len(model.layers)
