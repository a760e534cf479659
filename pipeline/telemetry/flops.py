"""Floating-point operations of a model, and what devices can do of them: for MFU and hours."""

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.stages import on_meta
from pipeline.recipe import Recipe
from pipeline.recipe.stages import begins

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


@dataclass(frozen=True)
class Flops:
    """`forward_flops` of each stage, after the epoch that it begins with; one, from epoch 0 on, of a recipe without."""

    stages: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, recipe: Recipe, num_classes: int, batch: int) -> "Flops":
        return cls(tuple((epoch, forward_flops(recipe, num_classes, batch, epoch)) for epoch in begins(recipe)))

    def at(self, epoch: int) -> float:
        return [flops for begins, flops in self.stages if begins <= epoch][-1]

    def mean(self, first: float, last: float) -> float:
        """Of the images between two points in time, in epochs."""
        ends = [begins for begins, _ in self.stages[1:]] + [max(last, self.stages[-1][0])]
        spans = [
            max(0.0, min(last, end) - max(first, begins)) for (begins, _), end in zip(self.stages, ends, strict=True)
        ]
        if not sum(spans):
            return self.at(int(first))
        return sum(span * flops for span, (_, flops) in zip(spans, self.stages, strict=True)) / sum(spans)


NO_FLOPS = Flops(((0, 0.0),))


def forward_flops(recipe: Recipe, num_classes: int, batch: int, epoch: int | None = None) -> float:
    """Operations of one image's forward pass in training, a multiplication and an addition counting as two: those of
    matrix products and convolutions, in a micro-batch of `batch` images; on all tokens of the largest images, or as in
    an epoch, whose selection of tokens counts too. Nothing is computed: the model is on meta."""
    model, images = on_meta(recipe, num_classes, batch, epoch)
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
