"""The fast path against the exact one: the same choices, pixels within a level, the same verdict on bad bytes."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from pipeline.augment.exact import TrainTransform
from pipeline.augment.fast import FastTrainTransform, resize
from pipeline.augment.policies import TorchvisionPolicy
from shards.jpeg import insert_restart_markers


def photo(height: int, width: int) -> Image.Image:
    """Ramps, edges and noise."""
    rows, columns = np.mgrid[:height, :width]
    ramps = np.stack([rows * 200 // height, columns * 200 // width, (rows // 10 + columns // 10) % 2 * 200], axis=-1)
    return Image.fromarray((ramps + np.random.default_rng(0).integers(0, 50, (height, width, 3))).astype(np.uint8))


def encoded(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, options.pop("format", "JPEG"), **options)
    return buffer.getvalue()


def black_and_white(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 2, (height, width, 3), np.uint8) * np.uint8(255))


SHAPES = [(90, 60), (60, 90), (90, 80), (200, 120), (30, 20), (64, 64), (1, 500), (500, 1), (3, 1)]
JPEG = encoded(photo(150, 200), quality=90)
FORMS = {
    "jpeg": JPEG,
    "progressive": encoded(photo(150, 200), progressive=True),
    "grey": encoded(photo(150, 200).convert("L")),
    "cmyk": encoded(photo(150, 200).convert("CMYK")),
    "png": encoded(photo(150, 200), format="PNG"),
}
with_jpegtran = pytest.mark.skipif(
    shutil.which("jpegtran") is None, reason="jpegtran is not on PATH (Debian: libjpeg-turbo-progs)"
)


@pytest.mark.parametrize("form", [*FORMS, pytest.param("restart markers", marks=with_jpegtran)])
@pytest.mark.parametrize("side", [64, 224])
def test_crops_are_within_a_level(form, side):
    data = FORMS[form] if form in FORMS else insert_restart_markers(JPEG)
    exact, fast = TrainTransform(side), FastTrainTransform(side)
    differences = []
    for draws in np.random.default_rng(1).random((12, exact.num_draws)):
        found = fast(data, draws)
        assert (found.shape, found.dtype) == ((side, side, 3), np.uint8)
        differences.append(found.astype(int) - exact(data, draws))
    assert np.abs(differences).max() <= 1
    assert np.abs(differences).mean() < 0.35


def test_randaugment_gets_the_same_operations():
    """Which amplify a level here and there: a posterised value may be off by a step, whole images are not."""
    exact, fast = (path(64, randaugment=TorchvisionPolicy(2, 15)) for path in (TrainTransform, FastTrainTransform))
    for draws in np.random.default_rng(2).random((40, exact.num_draws)):
        difference = np.abs(fast(JPEG, draws).astype(int) - exact(JPEG, draws))
        assert difference.mean() < 2
        assert np.median(difference) <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_resize_is_pillows(shape):
    image = photo(*shape)
    expected = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(resize(np.asarray(image).copy(), 64) - expected).max() <= 1


@pytest.mark.parametrize("picture", [photo, black_and_white])
@pytest.mark.parametrize("shape", SHAPES)
def test_bicubic_resize_is_pillows(shape, picture):
    """However much the cubic overshoots, which is most between black and white."""
    image = picture(*shape)
    expected = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(resize(np.asarray(image).copy(), 64, "bicubic") - expected).max() <= 2


def test_bicubic_crops_are_hardly_off():
    exact, fast = (path(96, interpolation="bicubic") for path in (TrainTransform, FastTrainTransform))
    draws = np.random.default_rng(3).random((60, exact.num_draws))
    crops = [exact(JPEG, row) for row in draws]
    difference = np.abs(np.array([fast(JPEG, row) for row in draws]).astype(int) - crops)
    assert difference.max() <= 2
    assert difference.mean() < 0.01
    assert (difference > 1).mean() < 1e-4
    bilinear = np.array([TrainTransform(96)(JPEG, row) for row in draws]).astype(int)
    assert np.abs(bilinear - crops).mean() > 1, "they are two filters"


@pytest.mark.parametrize("data", [b"not a jpg", JPEG[:1000], JPEG[:-600]])
def test_bad_bytes_are_refused_as_on_the_exact_path(data):
    draws = np.full(TrainTransform(64).num_draws, 0.999)
    for path in (TrainTransform, FastTrainTransform):
        with pytest.raises(ValueError, match=f"cannot decode an image from {len(data)} bytes"):
            path(64)(data, draws)
