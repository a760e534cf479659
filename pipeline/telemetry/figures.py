"""What a logged step shows beside its metrics."""

import math
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pipeline.backend import World
from pipeline.telemetry.flops import FORWARDS_A_STEP, NO_FLOPS, Flops
from pipeline.telemetry.norms import GradientNorms


@dataclass(frozen=True)
class Figures:
    """`flops`: operations of one image's forward pass, by epochs; `peak`: a second, of one device, None where that is
    not known; norms: None where they were not asked for."""

    world: World
    flops: Flops = NO_FLOPS
    peak: float | None = None
    norms: GradientNorms | None = None

    def __call__(self, values: Mapping[str, float]) -> dict[str, float]:
        """Beside the metrics of a logged step; every rank calls it. images_per_second_per_gpu (of a rank, where there
        is no GPU), memory_gib: see `peak_memory`, mfu: the share of the device's peak that the model's own operations
        are (where the peak is known), and the gradient norm of every parameter (where asked for)."""
        rate = values["images_per_second"] / self.world.size
        found = {
            "images_per_second_per_gpu": rate,
            "memory_gib": max(self.world.gather(peak_memory(self.world))) / 2**30,
        }
        if self.peak:
            flops = self.flops.at(math.ceil(values["epoch"]) - 1)  # of this step, whatever the interval began with
            found["mfu"] = rate * FORWARDS_A_STEP * flops / self.peak
        return found | (self.norms.read(values["grad_norm"]) if self.norms else {})


def peak_memory(world: World) -> int:
    """Bytes, of this rank: on CUDA what tensors took at most since this was last asked, else the largest resident set
    of the process (without its workers) since it began."""
    if world.device.type == "cuda":
        found = torch.cuda.max_memory_allocated(world.device)
        torch.cuda.reset_peak_memory_stats(world.device)
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
