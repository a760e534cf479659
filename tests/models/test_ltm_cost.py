"""What LTM costs at ratio 0.8, as tools/ltm_cost.py prints, and by a count of its own."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.ltm.sizes import BASES
from tools import ltm_cost

# model and pixels: millions of parameters, GMACs of the base, and of LTM at 0.8
COST = {
    ("ltm_mobilevit_xs", 224): (2.318, 0.703, 0.680),
    ("ltm_mobilevit_s", 224): (5.579, 1.417, 1.361),
    ("ltm_efficientvit_b1", 224): (9.102, 0.519, 0.499),
    ("ltm_efficientvit_b1", 288): (9.102, 0.856, 0.835),
    ("ltm_vit_small", 224): (22.051, 4.599, 1.627),
    ("ltm_vit_base", 224): (86.568, 17.564, 6.134),
    ("ltm_swin_tiny", 224): (28.288, 4.491, 4.038),
    ("ltm_swin_base", 224): (87.768, 15.431, 13.743),
}


def counted(name: str, side: int) -> tuple[float, float]:
    """Millions of parameters and GMACs of a model of timm's registry, in evaluation."""
    options = {"img_size": side} if "vit_" in name and "mobile" not in name and "efficient" not in name else {}
    with torch.device("meta"):
        model, images = timm.create_model(name, **options).eval(), torch.empty(1, 3, side, side)
    layers = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(
                lambda layer, given, made: layers.append(made.numel() * layer.weight[0].numel())
            )
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    macs = sum(layers) if "mobilevit" in name else counter.get_total_flops() / 2
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6, macs / 1e9


@pytest.mark.parametrize(("name", "side"), COST)
def test_parameters_and_macs(name, side):
    millions, base, merging = COST[name, side]
    assert counted(BASES[name], side) == pytest.approx((millions, base), abs=6e-4)
    assert counted(name, side) == pytest.approx((millions, merging), abs=6e-4)


def test_the_table_tells_ours_from_the_authors(capsys):
    assert ltm_cost.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = [
        f"{f'{model} at {side} px':<40}{millions:>10.3f}{macs:>9.3f}{'':>9}  measured here"
        for (name, side), (millions, base, merging) in COST.items()
        for model, macs in ((BASES[name], base), (name, merging))
    ]
    assert [line for line in lines if line.endswith("  measured here")] == expected
    theirs = [line for line in lines if line.endswith("  the authors' table")]
    assert len(theirs) == 31
    assert "LTM-ViT-B                                     86.5    12.90     83.9  the authors' table" in theirs
    assert "LTM has 0.35 of its base here, 0.73 in the table: -6.77 G from theirs." in lines
