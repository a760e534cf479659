"""The information-bottleneck loss of LTM (learnable token merging, arXiv 2407.15219), as its authors' code has it.

Shapes: B, n samples; D width of a vector; K centroids, a of them of features, b of pixels; C classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_SMALLEST = 1e-10  # of what a logarithm is taken


def soft_assign(vectors: Tensor, centroids: Tensor, beta: float = 1.0) -> Tensor:
    """phi(v, a) = softmax over a of -beta ||v / ||v|| - c_a||^2, for centroids c_a of length 1.

    (B, D), (K, D) -> (B, K). The square is multiplied out, and ||v / ||v|||^2 left away, for it is the same for all a.
    """
    products = F.normalize(vectors, dim=1) @ centroids.mT
    return torch.softmax(beta * (2 * products - centroids.square().sum(dim=1)), dim=1)


def class_sums(assignments: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """sum_i phi(F_i, a) 1[y_i = y]: (n, K), int64 (n) -> (K, C)."""
    sums = assignments.new_zeros(num_classes, assignments.shape[1])
    return sums.index_add_(0, labels, assignments).mT


def class_profile(assignments: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Q[a, y]: the mean assignment of a class's samples; 0 for one without any. (n, K), int64 (n) -> (K, C)."""
    counts = torch.bincount(labels, minlength=num_classes).clamp(min=1)
    return class_sums(assignments, labels, num_classes) / counts


def ib_bound(phi_f: Tensor, phi_x: Tensor, q: Tensor, labels: Tensor) -> Tensor:
    """The variational upper bound of I(F; X) - I(F; Y), up to a constant:

    mean_i [ sum_a sum_b phi(F_i, a) phi(X_i, b) log phi(X_i, b) - sum_a phi(F_i, a) log Q[a, y_i] ].

    (B, K_f), (B, K_x), (K_f, C), int64 (B) -> scalar. As the assignments sum to 1, the first term has no gradient.
    """
    pixels = (phi_x * _log(phi_x)).sum(dim=1)
    features = (phi_f * _log(q[:, labels].mT)).sum(dim=1)
    return (phi_f.sum(dim=1) * pixels - features).mean()


def mutual_information(joint: Tensor) -> Tensor:
    """I(A; B) = H(A) + H(B) - H(A, B) in nats, of joint probabilities that sum to 1. (K_a, K_b) -> scalar."""
    entropies = [torch.special.entr(part).sum() for part in (joint.sum(dim=1), joint.sum(dim=0), joint)]
    return entropies[0] + entropies[1] - entropies[2]


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp(min=_SMALLEST).log()
