"""Learning rate as a function of the optimizer step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up, half a cosine, then the minimum for ever.

    Step k (0-based) of W warm-up and T total steps: k < W: w0 + (lr - w0) k / W, else
    min + (lr - min) / 2 (1 + cos(pi (k - W) / (T - W))), as the authors of ViTTM train.
    """

    lr: float
    warmup_lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.warmup_lr + (self.lr - self.warmup_lr) * step / self.warmup_steps
        if step >= self.total_steps:
            return self.min_lr
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.min_lr + (self.lr - self.min_lr) / 2 * (1 + math.cos(math.pi * progress))
