"""Whether a model is trained against an information bottleneck."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bottleneck:
    weight: float = 0.0
    """LTM: factor of its information-bottleneck bound in the loss, beside cross-entropy without smoothing; 0: off."""
    after: str = "30%"
    """How long, in whole epochs, the loss is as it is without: epochs, steps, images, or a percentage of the length."""
    centroids: int = 1000
    """Clusters of features, and of pixels."""
    iterations: int = 60
    """Most iterations of k-means."""
    samples: int = 25_600
    """Training samples, evenly spaced, that are clustered at each epoch's start, and whose features are profiled by
    class; over all ranks."""
