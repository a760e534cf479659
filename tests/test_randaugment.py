"""pipeline.augment.randaugment against torchvision's operations on Pillow images: the same bits."""

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from pipeline.augment import randaugment
from pipeline.augment.policies import RANDAUGMENT_BINS, randaugment_operations

RECIPE_BINS = (15, 20)
SIGNED = [operation.name for operation in randaugment_operations(32, 15) if operation.signed]


def photo(random, height, width):
    """Smooth colours with grain, which do not reach from 0 to 255."""
    colours = Image.fromarray(random.integers(40, 216, (4, 4, 3), np.uint8)).resize((width, height), Image.BICUBIC)
    return (np.asarray(colours) + random.normal(0, 6, (height, width, 3))).clip(0, 255).astype(np.uint8)


def noise(random, height, width):
    return random.integers(0, 256, (height, width, 3), np.uint8)


def one_colour(random, height, width):
    return np.broadcast_to(random.integers(0, 256, 3, np.uint8), (height, width, 3)).copy()


def one_channel(random, height, width):
    return noise(random, height, width) * np.array([0, 1, 0], np.uint8)


def black_and_white(random, height, width):
    return noise(random, height, width) // 128 * 255


def few_levels(random, height, width):
    """So few pixels a level, and such a highest one, that Pillow's equalising table goes beyond 255."""
    return np.maximum(photo(random, height, width) // 8, noise(random, height, width) // 255 * 200)


IMAGES = [photo, noise, one_colour, one_channel, black_and_white, few_levels]


def torchvisions(pixels, name, magnitude):
    image = _apply_op(Image.fromarray(pixels), name, magnitude, InterpolationMode.NEAREST, fill=None)
    return np.asarray(image)


def differing(pixels, choices):
    """Those (name, magnitude) of which ours is not torchvision's; `pixels` cannot be written to meanwhile."""
    pixels.flags.writeable = False
    return [
        choice
        for choice in choices
        if not np.array_equal(randaugment.apply(pixels, *choice), torchvisions(pixels, *choice))
    ]


def both_signs(size, magnitude_bin):
    for name, magnitude, signed in randaugment_operations(size, magnitude_bin):
        yield from [(name, magnitude), (name, -magnitude)][: 1 + signed]


@pytest.mark.parametrize("image", IMAGES)
def test_every_magnitude_at_32_pixels(image):
    choices = [choice for magnitude_bin in range(RANDAUGMENT_BINS) for choice in both_signs(32, magnitude_bin)]
    assert differing(image(np.random.default_rng(0), 32, 32), choices) == []


@pytest.mark.parametrize("magnitude_bin", RECIPE_BINS)
@pytest.mark.parametrize("image", IMAGES)
def test_magnitudes_of_recipes_at_224_pixels(image, magnitude_bin):
    assert differing(image(np.random.default_rng(1), 224, 224), list(both_signs(224, magnitude_bin))) == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 2), (2, 7), (3, 3), (3, 8), (37, 53), (80, 31)])
def test_other_shapes(shape):
    random = np.random.default_rng(2)
    choices = [choice for magnitude_bin in RECIPE_BINS for choice in both_signs(max(shape), magnitude_bin)]
    assert {image.__name__: differing(image(random, *shape), choices) for image in IMAGES} == {
        image.__name__: [] for image in IMAGES
    }


def test_magnitudes_outside_the_table():
    random = np.random.default_rng(3)
    choices = [(name, float(magnitude)) for name in SIGNED for magnitude in random.uniform(-1.5, 1.5, 40)]
    choices += [("Rotate", angle) for angle in (45.0, 90.0, 180.0, -200.5)]
    choices += [(name, shift) for name in ("TranslateX", "TranslateY") for shift in (-60.0, -48.0, 48.0, 60.0)]
    choices += [("Solarize", threshold) for threshold in (0.0, 0.5, 1.0, 254.5, 255.0, 256.0)]
    choices += [("Posterize", bits) for bits in (1.0, 8.0)]
    assert differing(photo(random, 48, 48), choices) == []


def test_a_second_operation_follows_the_first():
    pixels = photo(np.random.default_rng(4), 32, 32)
    choices = list(both_signs(32, 15))
    for first in choices:
        moved = randaugment.apply(pixels, *first)
        assert (moved.shape, moved.dtype, moved.flags.c_contiguous) == (pixels.shape, np.uint8, True)
        assert differing(moved, choices) == [], first


def test_an_unknown_operation_is_named():
    with pytest.raises(
        ValueError, match=r"RandAugment has no operation 'Invert', only Identity, ShearX, .*, Equalize$"
    ):
        randaugment.apply(np.zeros((2, 2, 3), np.uint8), "Invert", 0.0)
