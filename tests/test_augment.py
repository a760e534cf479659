"""pipeline.augment against torchvision's own classes, fed with the same draws, and against arithmetic by hand."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.mixup import mixup_target
from torchvision import transforms
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from pipeline.augment import choices, device, mixing
from pipeline.augment.exact import EvalTransform, TrainTransform
from pipeline.augment.mixing import Mix, Mixing
from pipeline.augment.policies import TorchvisionPolicy, randaugment_operations
from shards.crop import Box, decode
from shards.errors import UserError


@pytest.fixture
def photo():
    """An RGB image with edges, ramps and noise, 90 wide and 70 high."""
    rows, columns = np.mgrid[:70, :90]
    ramps = np.stack([rows * 3, columns * 2, (rows // 10 + columns // 10) % 2 * 200], axis=-1)
    return Image.fromarray((ramps + np.random.default_rng(0).integers(0, 40, (70, 90, 3))).astype(np.uint8))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def chw(image):
    return np.asarray(image).transpose(2, 0, 1)


@pytest.fixture
def feed(monkeypatch):
    """feed(draws): torch's uniform_ and randint return these draws, in [0, 1), one after the other."""

    def install(draws):
        draws = iter(draws)

        def uniform_(tensor, low=0.0, high=1.0):
            return tensor.fill_(float(low) + float(high - low) * next(draws))

        def randint(*bounds, size=(1,)):
            low, high = (0, *(bound for bound in bounds if isinstance(bound, int)))[-2:]
            return torch.tensor([low + int(next(draws) * (high - low))])

        monkeypatch.setattr(torch.Tensor, "uniform_", uniform_)
        monkeypatch.setattr(torch, "randint", randint)

    return install


def attempts_then_position(draws, is_last):
    """torchvision draws the position right after the try that fits; ours is at a fixed place behind all tries."""
    tries = draws[:20].reshape(10, 2)
    used = next((i for i, pair in enumerate(tries) if is_last(pair)), 9)
    return [*tries[: used + 1].ravel(), *draws[20:]]


# --- the training transform


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (32, 32), (20, 900), (900, 20)])
def test_crop_boxes_are_torchvisions(shape, feed):
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    for draws in np.random.default_rng(1).random((60, choices.CROP_DRAWS)):
        box = choices.crop_box(draws, *shape, scale, ratio)

        def fits(pair):
            area = shape[0] * shape[1] * (scale[0] + (scale[1] - scale[0]) * pair[0])
            aspect = np.exp(np.log(ratio[0]) + np.log(ratio[1] / ratio[0]) * pair[1])
            return round(np.sqrt(area * aspect)) <= shape[1] and round(np.sqrt(area / aspect)) <= shape[0]

        feed(attempts_then_position(draws, fits))
        assert box == transforms.RandomResizedCrop.get_params(torch.empty(3, *shape), list(scale), list(ratio))


def test_crop_falls_back_to_the_centre():
    draws = np.full(choices.CROP_DRAWS, 0.999)  # nearly the whole area: too wide for a narrow image
    assert choices.crop_box(draws, 90, 10, (0.9, 1.0), (3 / 4, 4 / 3)) == Box(38, 0, 13, 10)
    assert choices.crop_box(draws, 10, 90, (0.9, 1.0), (3 / 4, 4 / 3)) == Box(0, 38, 10, 13)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("flip_draw", [0.49, 0.51])
def test_crop_and_flip_give_torchvisions_pixels(photo, flip_draw, interpolation):
    transform = TrainTransform(48, interpolation=interpolation)
    draws = np.random.default_rng(2).random(transform.num_draws)
    draws[choices.CROP_DRAWS] = flip_draw
    box = choices.crop_box(draws[: choices.CROP_DRAWS], 70, 90, transform.crop_scale, transform.crop_ratio)
    expected = F.resized_crop(photo, *box, [48, 48], F.InterpolationMode(interpolation), antialias=True)
    expected = F.hflip(expected) if flip_draw < 0.5 else expected
    result = transform(png(photo), draws)
    assert result.dtype == np.uint8
    assert result.shape == (48, 48, 3)
    np.testing.assert_array_equal(result, np.asarray(expected))


@pytest.mark.parametrize("magnitude", [0, 15, 20, 30])
def test_each_randaugment_operation_is_torchvisions(photo, feed, magnitude):
    transform = TrainTransform(40, crop_scale=(1.0, 1.0), hflip=0.0, randaugment=TorchvisionPolicy(1, magnitude))
    draws = np.full(transform.num_draws, 0.5)
    box = choices.crop_box(draws[: choices.CROP_DRAWS], 70, 90, transform.crop_scale, transform.crop_ratio)
    cropped = F.resized_crop(photo, *box, [40, 40])
    operations = randaugment_operations(40, magnitude)
    assert len(operations) == 14
    for index, sign_draw in itertools.product(range(14), (0.2, 0.7)):
        draws[-2:] = (index + 0.5) / 14, sign_draw
        feed(draws[-2:])
        expected = transforms.RandAugment(num_ops=1, magnitude=magnitude)(cropped)
        np.testing.assert_array_equal(
            transform(png(photo), draws), np.asarray(expected), err_msg=operations[index].name
        )


def test_randaugment_operations_follow_each_other(photo):
    names = [operation.name for operation in randaugment_operations(32, 30)]
    posterize, solarize = names.index("Posterize"), names.index("Solarize")
    transform = TrainTransform(32, hflip=0.0, randaugment=TorchvisionPolicy(2, 30))
    draws = np.full(transform.num_draws, 0.5)
    draws[-4:] = (posterize + 0.5) / 14, 0.0, (solarize + 0.5) / 14, 0.0
    plain = TrainTransform(32, hflip=0.0)(png(photo), draws[: choices.CROP_DRAWS + 1])
    np.testing.assert_array_equal(transform(png(photo), draws), 255 - (plain & 0b11110000))


def test_transform_depends_on_its_draws_alone(photo):
    transform = TrainTransform(32, randaugment=TorchvisionPolicy(2, 15))
    draws = np.random.default_rng(3).random((2, transform.num_draws))
    first = transform(png(photo), draws[0])
    torch.manual_seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    np.testing.assert_array_equal(transform(png(photo), draws[0]), first)
    assert (transform(png(photo), draws[1]) != first).any()
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])


# --- evaluation and decoding


@pytest.mark.parametrize(
    ("image_size", "crop_pct", "shorter"),
    [(224, 0.875, 256), (32, 0.875, 37), (48, 0.875, 55), (224, 224 / 248, 248), (48, 1.0, 48), (32, 0.5, 64)],
)
def test_eval_transform_is_torchvisions(photo, image_size, crop_pct, shorter):
    expected = transforms.Compose(
        [transforms.Resize(shorter, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(image_size)]
    )(photo)
    np.testing.assert_array_equal(EvalTransform(image_size, crop_pct)(png(photo)), np.asarray(expected))
    if crop_pct == 0.875:
        assert EvalTransform(image_size).resized == shorter


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_other_modes_become_rgb(photo, mode):
    image = decode(png(photo.convert(mode)))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(photo.convert(mode).convert("RGB")))


def test_palette_with_transparency_becomes_rgb_without_a_warning(photo, recwarn):
    palette, buffer = photo.convert("P"), io.BytesIO()
    palette.save(buffer, "png", transparency=bytes([0, 128]))
    np.testing.assert_array_equal(np.asarray(decode(buffer.getvalue())), np.asarray(palette.convert("RGB")))
    assert not recwarn.list


def test_cmyk_jpeg_becomes_rgb(photo):
    buffer = io.BytesIO()
    photo.convert("CMYK").save(buffer, "jpeg", quality=95)
    difference = chw(decode(buffer.getvalue())).astype(int) - chw(photo)
    assert np.abs(difference).mean() < 10


def test_16_bit_grey_keeps_its_high_byte():
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    expected = np.repeat((grey >> 8).astype(np.uint8)[None], 3, axis=0)
    np.testing.assert_array_equal(chw(decode(png(Image.fromarray(grey)))), expected)


def test_undecodable_bytes_raise(photo):
    with pytest.raises(ValueError, match="cannot decode an image from 9 bytes: Pillow knows no such format"):
        decode(b"not a jpg")
    with pytest.raises(ValueError, match=r"cannot decode an image from \d+ bytes"):
        TrainTransform(32)(png(photo)[:-2000], np.zeros(choices.CROP_DRAWS + 1))
    with pytest.raises(ValueError, match="cannot decode"):
        EvalTransform(32)(b"")


# --- on the device


def test_normalise_is_torchvisions():
    images = torch.arange(256, dtype=torch.uint8).repeat(12).view(2, 3, 16, 32)
    expected = F.normalize(images.float() / 255, device.IMAGENET_MEAN, device.IMAGENET_STD)
    assert torch.equal(device.normalise(images), expected)
    assert device.normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))[0, 0, 0, 0] == pytest.approx(-0.485 / 0.229)


@pytest.mark.parametrize("scale", [(0.02, 0.33), (0.02, 1 / 3), (0.3, 0.6)])
def test_erasing_boxes_are_torchvisions(feed, scale):
    draws = np.random.default_rng(4).random((200, device.ERASING_DRAWS))
    boxes = device.erasing_boxes(torch.from_numpy(draws), 1.0, 40, 60, scale)

    def fits(pair):
        area = 2400 * (scale[0] + (scale[1] - scale[0]) * pair[0])
        aspect = np.exp(np.log(0.3) + np.log(11.0) * pair[1])
        return round(np.sqrt(area * aspect)) < 40 and round(np.sqrt(area / aspect)) < 60

    for sample, box in zip(draws, boxes.tolist(), strict=True):
        feed(attempts_then_position(sample[1:], fits))
        expected = transforms.RandomErasing.get_params(torch.empty(3, 40, 60), scale, (0.3, 3.3), [0.0])
        if expected[2:4] == (40, 60):  # torchvision gives up by the whole image
            expected = (0, 0, 0, 0)
        assert box == list(expected[:4])


def test_erasing_boxes_lie_inside_and_come_as_often_as_asked():
    draws = torch.from_numpy(np.random.default_rng(5).random((20_000, device.ERASING_DRAWS)))
    boxes = device.erasing_boxes(draws, 0.25, 32, 32)
    top, left, height, width = boxes.unbind(1)
    erased = height > 0
    assert erased.float().mean() == pytest.approx(0.25, abs=0.01)
    assert (boxes >= 0).all()
    assert (top + height <= 32).all()
    assert (left + width <= 32).all()
    assert not boxes[~erased].any()
    assert (height * width)[erased].float().mean() / 1024 == pytest.approx(0.175, abs=0.01)
    assert torch.equal(boxes[100:200], device.erasing_boxes(draws[100:200], 0.25, 32, 32))


def test_erasing_gives_up_after_ten_tries():
    draws = torch.full((1, device.ERASING_DRAWS), 0.999, dtype=torch.float64)  # a third of the area, 3.3 high to 1
    assert device.erasing_boxes(draws, 1.0, 16, 64).tolist() == [[0, 0, 0, 0]]


def test_erase_zeroes_each_samples_own_box():
    images = torch.randn(3, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0], [5, 0, 3, 10]])
    expected = images.clone()
    expected[0, :, 1:4, 2:6] = 0
    expected[2, :, 5:8, 0:10] = 0
    assert torch.equal(device.erase(images, boxes), expected)


# --- mixing


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 12, 16, generator=generator)
    return images, device.one_hot(torch.randint(5, (8,), generator=generator), 5)


def test_one_hot():
    assert device.one_hot(torch.tensor([2, 0]), 3).tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    torch.testing.assert_close(
        device.one_hot(torch.tensor([1]), 4, 0.2), torch.tensor([[0.05, 0.85, 0.05, 0.05]]), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothed_and_mixed_targets_are_timms(smoothing):
    labels = torch.tensor([2, 0])  # timm mixes with the batch turned round: of two samples, with the neighbour
    images = torch.zeros(2, 3, 4, 4)
    _, targets = Mix("mixup", 0.3).apply(images, device.one_hot(labels, 7, smoothing))
    assert torch.equal(targets, mixup_target(labels, 7, 0.3, smoothing))


@pytest.mark.parametrize("mix", [Mix("mixup", 0.3), Mix("cutmix", 1 - 12 / 192, Box(2, 3, 3, 4)), Mix()])
def test_even_slices_are_mixed_as_the_whole(batch, mix):
    images, targets = mix.apply(*batch)
    for rank in range(4):
        part = slice(2 * rank, 2 * rank + 2)
        own_images, own_targets = mix.apply(batch[0][part], batch[1][part])
        assert torch.equal(own_images, images[part])
        assert torch.equal(own_targets, targets[part])
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))


def test_mixup_blends_neighbours(batch):
    images, targets = Mix("mixup", 0.25).apply(*batch)
    torch.testing.assert_close(images[4], 0.25 * batch[0][4] + 0.75 * batch[0][5])
    torch.testing.assert_close(targets[5], 0.25 * batch[1][5] + 0.75 * batch[1][4])


def test_cutmix_pastes_the_neighbours_box(batch):
    images, _ = Mix("cutmix", 1 - 12 / 192, Box(2, 3, 3, 4)).apply(*batch)
    expected = batch[0].clone()
    expected[6, :, 2:5, 3:7] = batch[0][7, :, 2:5, 3:7]
    assert torch.equal(images[6], expected[6])


def test_cutmix_lambda_is_the_area_kept():
    mixes = [Mixing(False, True, 0.5, 1.0).draw(0, step, 20, 30) for step in range(200)]
    for mix in mixes:
        assert mix.kind == "cutmix"
        assert mix.lam == pytest.approx(1 - mix.box.height * mix.box.width / 600)
        assert 0 <= mix.box.top <= mix.box.top + mix.box.height <= 20
        assert 0 <= mix.box.left <= mix.box.left + mix.box.width <= 30
    assert len({mix.box for mix in mixes}) > 100


def test_cutmix_box_is_torchvisions(feed):
    theirs = v2.CutMix(num_classes=2)
    for lam, (row, column) in zip(np.linspace(0, 0.99, 40), np.random.default_rng(6).random((40, 2)), strict=True):
        ours = mixing._cutmix(lam, np.array([row, column]), 20, 30)
        feed([column, row])
        theirs._dist = type("Fixed", (), {"sample": lambda self, shape, lam=lam: torch.tensor(lam)})()
        params = theirs.make_params([torch.empty(2, 3, 20, 30)])
        top, left, height, width = ours.box
        assert params["box"] == (left, top, left + width, top + height)
        assert params["lam_adjusted"] == pytest.approx(ours.lam)


def test_mixing_draws_are_keyed_by_seed_and_step():
    mixing = Mixing(mixup=True, cutmix=True, mixup_alpha=0.8, cutmix_alpha=0.8)
    mixes = [mixing.draw(7, step, 32, 32) for step in range(400)]
    assert mixes == [mixing.draw(7, step, 32, 32) for step in range(400)]
    assert mixes != [mixing.draw(8, step, 32, 32) for step in range(400)]
    assert sum(mix.kind == "mixup" for mix in mixes) == pytest.approx(200, abs=40)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_mixup_lambda_is_beta(alpha):
    mixing = Mixing(mixup=True, cutmix=False, mixup_alpha=alpha, cutmix_alpha=9.0)
    lams = np.array([mixing.draw(0, step, 32, 32).lam for step in range(4000)])
    assert lams.mean() == pytest.approx(0.5, abs=0.02)
    assert lams.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.01)


def test_mixup_and_cutmix_have_alphas_of_their_own():
    """The one that is not drawn does not matter; both draw the same, whatever the alphas are."""
    both, other = Mixing(True, True, 0.8, 0.8), Mixing(True, True, 0.8, 50.0)
    pairs = [(both.draw(3, step, 512, 512), other.draw(3, step, 512, 512)) for step in range(300)]
    assert all(one.kind == two.kind for one, two in pairs)
    assert all(one == two for one, two in pairs if one.kind == "mixup")
    wide, narrow = (np.array([pair[side].lam for pair in pairs if pair[0].kind == "cutmix"]) for side in (0, 1))
    assert narrow.min() > 0.3, "of Beta(50, 50), whose deviation is 0.05"
    assert wide.min() < 0.2, "of Beta(0.8, 0.8)"
    for step, (one, _) in enumerate(pairs):  # what one alpha for both drew
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([mixing.MIXING_STREAM, 3, step])))
        kind, lam = generator.integers(2), generator.beta(0.8, 0.8)
        assert one.lam == lam if kind == 0 else one == mixing._cutmix(lam, generator.random(2), 512, 512)


def test_no_mixing(batch):
    mix = Mixing(False, False, 0.8, 0.8).draw(0, 0, 32, 32)
    assert mix == Mix()
    assert mix.apply(*batch) == batch


def test_an_odd_batch_cannot_be_mixed(batch):
    with pytest.raises(UserError, match=r"a micro-batch of 7 leaves one over; take an even batch a rank"):
        Mix("mixup", 0.5).apply(batch[0][:7], batch[1][:7])
