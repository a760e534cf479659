"""Floating-point operations of a model, and what devices can do of them: for MFU and hours."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.build import make_model
from pipeline.recipe import Recipe

FORWARDS_A_STEP = 3
"""A training step counts as three forward passes: the backward pass has two products where the forward one has one
(Kaplan et al. 2020, arXiv 2001.08361, section 2.1). What is computed twice to save memory does not count."""

PEAKS = {
    "NVIDIA A100-SXM4-40GB": {"half": 312.0, "fp32": 19.5},
    "NVIDIA A100-SXM4-80GB": {"half": 312.0, "fp32": 19.5},
    "NVIDIA A100-PCIE-40GB": {"half": 312.0, "fp32": 19.5},
    "NVIDIA A100 80GB PCIe": {"half": 312.0, "fp32": 19.5},
    "NVIDIA H100 80GB HBM3": {"half": 989.4, "fp32": 66.9},
    "NVIDIA H100 PCIe": {"half": 756.0, "fp32": 51.0},
    "NVIDIA H200": {"half": 989.4, "fp32": 66.9},
    "NVIDIA L4": {"half": 121.0, "fp32": 30.3},
    "NVIDIA L40S": {"half": 362.0, "fp32": 91.6},
}
"""Dense TFLOP/s by the name that torch gives a device: bf16 and fp16 on tensor cores, fp32 without TF32 (torch's
default). From NVIDIA's data sheets of each card and its white papers of the Ampere and the Hopper architecture."""


def forward_flops(recipe: Recipe, num_classes: int, batch: int) -> float:
    """Operations of one image's forward pass in training, a multiplication and an addition counting as two: those of
    matrix products and convolutions, in a micro-batch of `batch` images. Nothing is computed: the model is on meta."""
    side = recipe.augment.image_size
    with torch.device("meta"):
        model = make_model(recipe, num_classes)
        images = torch.empty(batch, 3, side, side)
    # The products of attention are counted only where they are products: fused kernels of CPUs have no formula.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() / batch


def peak_flops(recipe: Recipe, device: torch.device) -> float | None:
    """Operations a second that the recipe's precision could reach on one device: runtime.peak_tflops where it is given;
    None for a device that PEAKS lacks, and for CPUs."""
    if recipe.runtime.peak_tflops:
        return recipe.runtime.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    known = PEAKS.get(torch.cuda.get_device_name(device))
    return known["fp32" if recipe.runtime.precision == "fp32" else "half"] * 1e12 if known else None
