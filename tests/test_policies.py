"""pipeline.augment.policies: timm's RandAugment from a sample's draws, against timm's own classes."""

import io
import itertools
import random
from statistics import NormalDist

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment, create_transform

from pipeline.augment.exact import TrainTransform
from pipeline.augment.fast import FastTrainTransform
from pipeline.augment.policies import TimmPolicy, TorchvisionPolicy
from pipeline.recipe import Augment

NAMES = auto_augment._RAND_INCREASING_TRANSFORMS
PLAIN = auto_augment._RAND_TRANSFORMS
LEVELS = (0.0, 1e-9, 0.03, 0.5, 0.8, 1 - 2**-53)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Ramps, edges and noise; 56 wide and high."""
    rows, columns = np.mgrid[:56, :56]
    ramps = np.stack([rows * 4, columns * 3, (rows // 10 + columns // 10) % 2 * 160], axis=-1)
    return Image.fromarray((ramps + np.random.default_rng(0).integers(0, 30, (56, 56, 3))).astype(np.uint8))


@pytest.fixture
def timms(monkeypatch):
    """timms(magnitude, std, ops, interpolation, increasing)(image, draws): timm's RandAugment, as its create_transform
    makes it, which draws what ours does."""

    def make(magnitude, std, ops, interpolation, increasing=True):
        names = NAMES if increasing else PLAIN
        name = f"rand-m{magnitude}-n{ops}-mstd{std}" + "-inc1" * increasing
        whole = create_transform(56, is_training=True, auto_augment=name, interpolation=interpolation)
        (policy,) = [each for each in whole.transforms if isinstance(each, auto_augment.RandAugment)]

        def call(image, draws):
            rows = draws.reshape(ops, 4)
            steered = Steered(rows)
            monkeypatch.setattr(auto_augment, "random", steered)
            monkeypatch.setattr(np.random, "choice", lambda items, *_, **__: [items[int(row[0] * 15)] for row in rows])
            found = []
            for operation, row in zip(np.random.choice(policy.ops), rows, strict=True):
                steered.begin(row)
                found.append(operation)
                image = posterised(operation, image) if "Posterize" in operation.name else operation(image)
            assert [each.name for each in found] == [names[int(row[0] * 15)] for row in rows]
            return image

        return call

    return make


def posterised(operation, image):
    """Where timm's magnitude is cut to 10 it asks Pillow for no bits, which made black before that was an error."""
    try:
        return operation(image)
    except ValueError:  # bits must be between or equal to 1 and 8
        return Image.new("RGB", image.size)


class Steered:
    """In the place of the module random: an operation's draws, in the order in which timm draws them."""

    def __init__(self, rows):
        self.begin(rows[0])

    def begin(self, row):
        _, skip, self.level, sign = row
        self.uniform = iter((skip, sign))

    def random(self):
        return next(self.uniform)

    def gauss(self, mean, deviation):
        return NormalDist(mean, deviation).inv_cdf(max(self.level, 2**-54))


@pytest.mark.parametrize(("interpolation", "increasing"), [("bilinear", True), ("bicubic", True), ("bicubic", False)])
@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_each_operation_is_timms(photo, timms, number, interpolation, increasing):
    for magnitude, std in ((9, 0.5), (9, 0.0), (5, 4.0), (0, 0.0), (10, 0.0)):
        given = interpolation, increasing
        ours, theirs = TimmPolicy(1, magnitude, std, *given), timms(magnitude, std, 1, *given)
        for level, sign in itertools.product(LEVELS if std else (0.5,), (0.2, 0.7)):
            draws = np.array([(number + 0.5) / len(NAMES), 0.3, level, sign])
            expected = np.asarray(theirs(photo, draws))
            np.testing.assert_array_equal(np.asarray(ours.on_image(photo, draws)), expected)
            np.testing.assert_array_equal(ours.on_pixels(np.asarray(photo), draws), expected)


def test_operations_follow_each_other_or_are_skipped(photo, timms):
    ours, theirs, unchanged = TimmPolicy(3, 9, 0.5, "bicubic"), timms(9, 0.5, 3, "bicubic"), 0
    for draws in np.random.default_rng(0).random((80, ours.num_draws)):
        found = ours.on_pixels(np.asarray(photo), draws)
        np.testing.assert_array_equal(found, np.asarray(theirs(photo, draws)))
        np.testing.assert_array_equal(np.asarray(ours.on_image(photo, draws)), found)
        unchanged += np.array_equal(found, np.asarray(photo))
    assert 3 <= unchanged <= 20, "an eighth of them skips all three"


def test_operations_levels_and_signs_come_as_often_as_timm_draws_them():
    policy, count = TimmPolicy(2, 9, 0.5), 15_000
    draws = np.random.default_rng(1).random((count, policy.num_draws))
    found = [each for row in draws for each in policy.operations(row)]
    assert len(found) == pytest.approx(count, rel=0.03)
    names, counts = np.unique([name for name, _ in found], return_counts=True)
    assert sorted(NAMES) == names.tolist()
    assert counts == pytest.approx(count / 15, rel=0.15)
    random.seed(0)
    theirs = np.clip([random.gauss(9, 0.5) for _ in range(count)], 0, 10)
    angles = np.array([values[0] for name, values in found if name == "Rotate"])
    for quantile in (0.1, 0.5, 0.9, 0.99):
        expected = np.quantile(theirs, quantile) * 3
        assert np.quantile(abs(angles), quantile) == pytest.approx(expected, abs=0.2)
    assert (angles < 0).mean() == pytest.approx(0.5, abs=0.05)


def test_nothing_is_drawn_from_elsewhere(photo):
    policy, states = TimmPolicy(2, 9, 0.5, "bicubic"), (random.getstate(), np.random.get_state()[1].copy())
    for number in range(len(NAMES)):
        row = [(number + 0.5) / len(NAMES), 0.1, 0.4, 0.6]
        policy.on_image(photo, np.array([*row, *row]))
    assert random.getstate() == states[0]
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])


def test_both_paths_ask_for_what_the_recipe_says(photo):
    """Of which the fast one's resize is off by a level here and there, which an operation may make more of."""
    section = Augment(
        40,
        interpolation="bicubic",
        randaugment="timm-increasing",
        randaugment_ops=2,
        randaugment_magnitude=8,
        randaugment_std=0.5,
    )
    exact, fast = TrainTransform.of(section), FastTrainTransform.of(section)
    assert exact == TrainTransform(40, interpolation="bicubic", randaugment=TimmPolicy(2, 8, 0.5, "bicubic"))
    plain = TrainTransform.of(Augment(randaugment="timm", randaugment_ops=2, randaugment_std=0.5))
    assert plain.randaugment == TimmPolicy(2, 9, 0.5, increasing=False)
    assert TrainTransform.of(Augment(randaugment_ops=3)) == TrainTransform(224, randaugment=TorchvisionPolicy(3, 9))
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    data = buffer.getvalue()
    for draws in np.random.default_rng(2).random((40, exact.num_draws)):
        difference = np.abs(exact(data, draws).astype(int) - fast(data, draws))
        assert difference.mean() < 0.5
        assert np.median(difference) == 0
