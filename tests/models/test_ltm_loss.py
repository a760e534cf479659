"""The information-bottleneck loss of LTM, against small cases that are worked out by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from pipeline.models.ltm_loss import class_profile, ib_bound, mutual_information, soft_assign


def near(found: torch.Tensor, expected: object) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=1e-6, atol=1e-7)


def test_assignments_are_by_the_distance_of_the_direction():
    """(3, 4) has the direction (.6, .8): squares .8, .4 and 3.2 from the axes' centroids."""
    centroids = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    weights = [math.exp(-square) for square in (0.8, 0.4, 3.2)]
    near(soft_assign(torch.tensor([[3.0, 4]]), centroids), [[weight / sum(weights) for weight in weights]])
    sharper = [math.exp(-5 * square) for square in (0.8, 0.4, 3.2)]
    near(soft_assign(torch.tensor([[0.3, 0.4]]), centroids, 5.0), [[weight / sum(sharper) for weight in sharper]])


def test_assignments_to_centroids_of_other_lengths():
    centroids = torch.randn(4, 6, dtype=torch.float64)
    vectors = torch.randn(3, 6, dtype=torch.float64)
    squares = (F.normalize(vectors).unsqueeze(1) - centroids).square().sum(dim=2)
    near(soft_assign(vectors, centroids, 0.7), torch.softmax(-0.7 * squares, dim=1))


def test_a_black_image_is_assigned_evenly():
    near(soft_assign(torch.zeros(1, 2), torch.eye(2)), [[0.5, 0.5]])


def test_profile_is_the_mean_of_a_class_and_zero_without_samples():
    assignments = torch.tensor([[0.5, 0.5], [1, 0], [0.25, 0.75]])
    near(class_profile(assignments, torch.tensor([0, 2, 0]), 3), [[0.375, 0, 1], [0.625, 0, 0]])


def test_bound_of_two_samples():
    phi_f = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    phi_x = torch.tensor([[0.5, 0.5, 0], [1, 0, 0]])
    q = torch.tensor([[0.5, 0], [0.5, 1]])
    first = math.log(0.5) - math.log(0.5)  # features of class 0: 0.5 log 0.5 + 0.5 log 0.5
    second = 0 - (0.25 * math.log(1e-10) + 0.75 * math.log(1))
    near(ib_bound(phi_f, phi_x, q, torch.tensor([0, 1])), (first + second) / 2)


def test_the_first_term_has_no_gradient():
    """Where the second one has none either, because the profiles are even."""
    features = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    phi_f = soft_assign(features, F.normalize(torch.randn(4, 3, dtype=torch.float64)))
    phi_x = torch.softmax(torch.randn(5, 6, dtype=torch.float64), dim=1)
    even = torch.full((4, 2), 0.25, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1, 1])
    bound = ib_bound(phi_f, phi_x, even, labels)
    expected = (phi_x * phi_x.log()).sum(dim=1).mean() + math.log(4)
    near(bound.detach(), expected)
    (gradient,) = torch.autograd.grad(bound, features, retain_graph=True)
    assert gradient.abs().max() < 1e-15
    uneven = torch.softmax(torch.randn(4, 2, dtype=torch.float64), dim=0)
    (gradient,) = torch.autograd.grad(ib_bound(phi_f, phi_x, uneven, labels), features)
    assert gradient.abs().min() > 0


def test_gradient_of_the_bound_is_that_of_differences():
    features = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    centroids, q = F.normalize(torch.randn(5, 4, dtype=torch.float64)), torch.rand(5, 2, dtype=torch.float64)
    phi_x, labels = torch.softmax(torch.randn(3, 5, dtype=torch.float64), dim=1), torch.tensor([1, 0, 1])
    assert torch.autograd.gradcheck(lambda v: ib_bound(soft_assign(v, centroids), phi_x, q, labels), features)


@pytest.mark.parametrize(
    ("joint", "expected"),
    [
        ([[0.25, 0.25], [0.25, 0.25]], 0.0),
        ([[0.5, 0], [0, 0.5]], math.log(2)),
        ([[0.5, 0.25], [0, 0.25]], 0.5 * math.log(0.5 / 0.375) + 0.25 * math.log(0.25 / 0.375) + 0.25 * math.log(2)),
    ],
)
def test_mutual_information(joint, expected):
    near(mutual_information(torch.tensor(joint, dtype=torch.float64)), expected)
