"""pipeline.augment.erasing: where it fills, and noise that follows from a sample's draws alone."""

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing

from pipeline.augment import device
from pipeline.augment.erasing import Erasing, Noise, mean
from pipeline.augment.mixing import Mixing
from pipeline.data.device import DeviceAugment
from pipeline.recipe import Augment, Recipe


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(64, 3, 24, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def draws() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).random((64, Erasing.num_draws)))


def test_noise_fills_the_boxes_and_nothing_else(images, draws):
    """The boxes are those of the other fill, which a last draw a sample does not change."""
    plain, noisy = (Erasing(0.7, (0.1, 0.3), fill)(images, draws) for fill in (mean, Noise(3)))
    boxes = device.erasing_boxes(draws[:, :-1], 0.7, 24, 32, (0.1, 0.3))
    assert torch.equal(plain, device.erase(images, boxes))
    erased = (plain != images).any(dim=1, keepdim=True).expand_as(images)
    assert erased.any(dim=(1, 2, 3)).float().mean() == pytest.approx(0.7, abs=0.1)
    assert torch.equal(noisy[~erased], images[~erased])
    assert (noisy[erased] != images[erased]).all()
    assert torch.equal(noisy[erased], Noise(3)(images, draws[:, -1])[erased])


def test_noise_is_timms_by_distribution(images):
    """Independent normal values of mean 0 and deviation 1 a pixel and channel, of a sample and between samples."""
    theirs = RandomErasing(1.0, 0.3, 0.6, mode="pixel", device="cpu")
    torch.manual_seed(0)
    filled = theirs(torch.full_like(images, 9.0))
    ours = Noise(0)(images, torch.linspace(0.001, 0.999, 64, dtype=torch.float64))
    for values in (filled[filled != 9.0], ours):
        assert values.mean().item() == pytest.approx(0, abs=0.02)
        assert values.std().item() == pytest.approx(1, abs=0.02)
        assert (values.abs() > 1.96).float().mean().item() == pytest.approx(0.05, abs=0.005)
    together = torch.corrcoef(ours.flatten(1)) - torch.eye(64)
    assert together.abs().max() < 5 / (3 * 24 * 32) ** 0.5
    between_channels = torch.corrcoef(ours.transpose(0, 1).flatten(1)) - torch.eye(3)
    assert between_channels.abs().max() < 5 / (64 * 24 * 32) ** 0.5


def test_a_samples_noise_follows_from_its_draw_and_the_seed(images, draws):
    whole = Noise(3)(images, draws[:, 0])
    assert torch.equal(whole[5:8], Noise(3)(images[5:8], draws[5:8, 0]))
    assert not torch.equal(whole, Noise(4)(images, draws[:, 0]))
    torch.manual_seed(9)
    assert torch.equal(whole, Noise(3)(images, draws[:, 0])), "the bank was made anew, from its seed alone"
    ends = Noise(3)(images[:2], torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert torch.isfinite(ends).all()
    assert not torch.equal(ends[0], ends[1])


def test_a_recipe_says_what_is_done_on_the_device():
    section = Augment(
        erasing=0.3,
        erasing_fill="noise",
        erasing_scale=(0.1, 0.2),
        mixup=True,
        cutmix=True,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
    )
    noise, mixing = Erasing(0.3, (0.1, 0.2), Noise(7)), Mixing(True, True, 0.8, 1.0)
    found = DeviceAugment.of(Recipe(seed=7, label_smoothing=0.1, augment=section), 5)
    assert found == DeviceAugment(5, 7, noise, mixing, 0.1)
    plain = DeviceAugment(5, 0, Erasing(0.0, (0.02, 0.33), mean), Mixing(False, False, 0.5, 0.5), 0.0)
    assert DeviceAugment.of(Recipe(), 5) == plain
