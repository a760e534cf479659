"""Learning rate as a function of the optimizer step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up, half a cosine, then one value for ever: the minimum, or that of a cool-down.

    Step k (0-based) of W warm-up steps and a cosine that ends with step T: k < W: w0 + (lr - w0) k / W; k < T:
    min + (lr - min) / 2 (1 + cos(pi (k - W) / (T - W))), as the authors of ViTTM train. With `hold_steps` the cosine
    keeps the value of every so-manieth step until the next, as schedules that move once an epoch do.
    """

    lr: float
    warmup_lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int
    hold_steps: int = 1
    cooldown_lr: float | None = None

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.warmup_lr + (self.lr - self.warmup_lr) * step / self.warmup_steps
        if step >= self.total_steps:
            return self.min_lr if self.cooldown_lr is None else self.cooldown_lr
        held = max(step - step % self.hold_steps, self.warmup_steps)
        progress = (held - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.min_lr + (self.lr - self.min_lr) / 2 * (1 + math.cos(math.pi * progress))
