"""Boxes of images, to the last bit those of the whole image, whichever way they were decoded; the same errors, too."""

import io
import re
import shutil
import struct
import threading
from functools import cache

import cv2
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from shards import crop, jpeg
from shards.crop import Box, decode_box, has_crop_decode

needs_crop_decode = pytest.mark.skipif(
    not has_crop_decode(), reason="shards._crop_decode was not built (Debian: libjpeg62-turbo-dev, then install again)"
)
SAMPLINGS = ("4:2:0", "4:2:2", "4:4:0", "4:4:4", "grey", "RGB")
MCU = {"4:2:0": (16, 16), "4:2:2": (8, 16), "4:4:0": (16, 8)}  # height and width; else 8, 8
OPENCV = {"4:4:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440, "4:1:1": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411}
EDGES = [(0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5)]


@cache
def picture(height, width):
    """Blobs under noise, uint8 [height, width, 3]."""
    rng = np.random.default_rng((height, width))
    blobs = rng.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), dtype=np.uint8)
    noise = rng.normal(0, 20, (height, width, 3))
    return (cv2.resize(blobs, (width, height), interpolation=cv2.INTER_CUBIC) + noise).clip(0, 255).astype(np.uint8)


def encode(height, width, sampling="4:2:0", interval=0, quality=90, **options):
    """A JPEG with restart markers every `interval` MCUs."""
    if sampling in OPENCV:
        written = cv2.IMWRITE_JPEG_SAMPLING_FACTOR, OPENCV[sampling], cv2.IMWRITE_JPEG_RST_INTERVAL, interval
        return cv2.imencode(".jpg", picture(height, width), [cv2.IMWRITE_JPEG_QUALITY, quality, *written])[1].tobytes()
    image = Image.fromarray(picture(height, width))
    if sampling == "grey":
        image = image.convert("L")
    elif sampling == "RGB":
        options["keep_rgb"] = True
    else:
        options["subsampling"] = sampling
    return save(image, "JPEG", quality=quality, restart_marker_blocks=interval, **options)


def save(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def whole(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def boxes_of(height, width, rng, count):
    """The whole image, single pixels, and `count` boxes that hug its edges or lie anywhere."""
    yield Box(0, 0, height, width)
    for down, across in EDGES:
        yield Box(int(down * (height - 1)), int(across * (width - 1)), 1, 1)
    for _ in range(count):
        sides = [int(rng.integers(1, 1 + (side if rng.random() < 0.7 else min(side, 20)))) for side in (height, width)]
        rooms = [side - part for side, part in zip((height, width), sides, strict=True)]
        yield Box(*(int(rng.choice([0, room, rng.integers(room + 1)])) for room in rooms), *sides)


def check_boxes(data, count=12, tidy=True):
    """That boxes are right, and, of a tidy file, that nobody decoded it whole for them."""
    pixels = whole(data)
    for box in boxes_of(*pixels.shape[:2], np.random.default_rng(len(data)), count):
        top, left, height, width = box
        if has_crop_decode():
            assert (crop._crop_decode.decode(data, *box) is not None) == tidy
        decoded, chosen = decode_box(data, lambda _height, _width, box=box: box)
        np.testing.assert_array_equal(decoded, pixels[top : top + height, left : left + width], str(box))
        assert chosen is box
        assert decoded.flags.c_contiguous
        assert decoded.flags.writeable


def divisors(number):
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


# --- the same bits


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_boxes_of_any_size(sampling):
    rng = np.random.default_rng(SAMPLINGS.index(sampling))
    for number in range(24):
        height, width = (int(side) for side in rng.integers(1, 400 if number < 12 else 40, 2))
        mcus_per_row = -(-width // MCU.get(sampling, (8, 8))[1])
        interval = int(rng.choice([0, *divisors(mcus_per_row), *rng.integers(1, 2 * mcus_per_row + 1, 3)]))
        check_boxes(encode(height, width, sampling, interval, quality=int(rng.choice([1, 50, 75, 95, 100]))))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_boxes_of_images_of_few_pixels(sampling):
    """Where rows are less than 5 pixels wide libjpeg upsamples otherwise; a box cut out of wider ones must not care."""
    for height in (1, 2, 8, 9, 17):
        for width in (*range(1, 7), 15, *range(16, 22), *range(32, 37)):
            for interval in (0, 1):
                check_boxes(encode(height, width, sampling, interval), count=3)


@pytest.mark.parametrize("mcus_per_row", [1, 2, 3, 7, 11, 23, 31, 32])
def test_boxes_by_mcus_per_row(mcus_per_row):
    for interval in divisors(mcus_per_row):
        check_boxes(encode(100, 16 * mcus_per_row - 5, "4:2:0", interval), count=20)


@pytest.mark.skipif(shutil.which("jpegtran") is None, reason="jpegtran is not on PATH (Debian: libjpeg-turbo-progs)")
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_boxes_of_inserted_restart_markers(sampling):
    check_boxes(jpeg.insert_restart_markers(encode(99, 143, sampling)), count=40)


def segment(marker, parameters):
    return bytes((0xFF, marker)) + (len(parameters) + 2).to_bytes(2, "big") + parameters


def after_start(data, inserted):
    return data[:2] + inserted + data[2:]


def one_of_three(grey):
    """A grey JPEG whose frame has three components; its scan has but the first."""
    at = grey.index(b"\xff\xc0")
    components = b"\1\x11\0\2\x11\0\3\x11\0"
    return grey[:at] + segment(0xC0, grey[at + 4 : at + 9] + b"\3" + components) + grey[at + 13 :]


EXIF = b"Exif\0\0II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)  # turned by 90 degrees
ADOBE = b"Adobe\0\x64\0\0\0\0"


@pytest.mark.parametrize(
    "data",
    [
        after_start(encode(60, 70, interval=5), segment(0xE1, EXIF)),
        after_start(encode(60, 70), segment(0xE1, b"Exif\0\0" + encode(16, 16))),
        encode(60, 70, icc_profile=bytes(range(256)) * 400, comment="words"),
        encode(60, 70, optimize=True),
        encode(60, 70, interval=1).replace(b"\xff\xc0", b"\xff\xc1", 1),
        encode(60, 70, "4:4:4").replace(segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"), segment(0xEE, ADOBE + b"\1")),
        encode(60, 70, "4:4:4", interval=3).replace(
            segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"), segment(0xEE, ADOBE + b"\0")
        ),
        encode(60, 70) + b"\0" * 9,
        encode(60, 70)[:-2] + b"\0\xff\xd9",
        encode(60, 70, interval=5) + encode(20, 30),
    ],
    ids=[
        "turned",
        "thumbnail",
        "metadata",
        "optimized",
        "extended",
        "YCbCr",
        "as-RGB",
        "padded",
        "extraneous",
        "followed",
    ],
)
def test_tidy_files(data):
    check_boxes(data)


@pytest.mark.parametrize(
    "data",
    [
        encode(60, 70, progressive=True),
        encode(60, 70, "4:1:1"),
        encode(60, 70, "grey").replace(b"\1\1\x11\0", b"\1\1\x22\0", 1),
        one_of_three(encode(60, 70, "grey")),
        save(Image.fromarray(picture(60, 70)).convert("CMYK"), "JPEG"),
        save(Image.fromarray(picture(60, 70)), "PNG"),
        save(Image.fromarray(picture(60, 70)), "WEBP"),
        save(Image.fromarray(picture(60, 70)).convert("P"), "PNG", transparency=3),
        save(Image.fromarray(picture(60, 70)).convert("RGBA"), "PNG"),
        after_start(encode(60, 70), b"\xff"),
    ],
    ids=["progressive", "4:1:1", "grey-2x2", "scan-of-one", "CMYK", "PNG", "WebP", "palette", "alpha", "fill-byte"],
)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_other_files(data):
    check_boxes(data, tidy=False)


def test_16_bit_grey_keeps_its_high_byte():
    grey = (np.arange(6000).reshape(60, 100) * 10).astype(np.uint16)
    decoded, _ = decode_box(save(Image.fromarray(grey), "PNG"), lambda height, width: Box(3, 4, 50, 60))
    np.testing.assert_array_equal(decoded, np.repeat((grey >> 8).astype(np.uint8)[3:53, 4:64, None], 3, axis=2))


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(crop, "_crop_decode", None)
    check_boxes(encode(60, 70, interval=5))
    check_boxes(encode(60, 70))


@pytest.mark.parametrize("data", [encode(60, 70), encode(60, 70, progressive=True)], ids=["baseline", "progressive"])
def test_the_box_is_chosen_once(data):
    asked = []
    decode_box(data, lambda height, width: asked.append((height, width)) or Box(0, 0, 1, 1))
    assert asked == [(60, 70)]


@pytest.mark.parametrize("data", [encode(60, 70), encode(60, 70, progressive=True)], ids=["baseline", "progressive"])
@pytest.mark.parametrize(
    "box", [(0, 0, 61, 70), (1, 0, 60, 70), (0, 69, 1, 2), (-1, 0, 2, 2), (0, -1, 2, 2), (9, 9, 0, 1)]
)
def test_a_box_outside(data, box):
    with pytest.raises(ValueError, match=r"^the box lies outside the image$"):
        decode_box(data, lambda height, width: Box(*box))


# --- only what the box needs


def garbled(data, keep):
    """`data` with other bits in all restart segments but those whose numbers are in `keep`."""
    start = data.index(b"\xff\xda") + 14
    parts = re.split(rb"(\xff[\xd0-\xd9])", data[start:])  # segments, and the markers between and behind them
    for number in range(len(parts) // 2):
        if number not in keep:
            parts[2 * number] = b"\x55" * len(parts[2 * number])
    return data[:start] + b"".join(parts)


@needs_crop_decode
@pytest.mark.parametrize(
    ("box", "keep"),
    [
        (Box(33, 65, 14, 30), {12}),  # five segments a row, 16 pixels high and 32 wide
        (Box(32, 64, 16, 32), {6, 7, 8, 11, 12, 13, 16, 17, 18}),  # with its neighbours, as chroma is interpolated
        (Box(80, 0, 16, 31), {20, 25}),
        (Box(0, 129, 15, 31), {4}),
    ],
)
def test_only_segments_that_cover_the_box_are_decoded(box, keep):
    data = encode(96, 160, interval=2)
    top, left, height, width = box
    decoded = crop._crop_decode.decode(garbled(data, keep), *box)
    assert decoded == whole(data)[top : top + height, left : left + width].tobytes()
    for number in keep:
        assert crop._crop_decode.decode(garbled(data, keep - {number}), *box) != decoded


@needs_crop_decode
def test_rows_below_the_box_are_not_decoded():
    data = encode(96, 160, interval=20)  # two rows of MCUs
    decoded = crop._crop_decode.decode(garbled(data, {0}), 3, 7, 27, 120)
    assert decoded == whole(data)[3:30, 7:127].tobytes()
    assert crop._crop_decode.decode(garbled(data, {1, 2}), 3, 7, 27, 120) != decoded


# --- broken data


MARKED = encode(96, 160, interval=2)
MARKERS = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7]", MARKED)]


def outcome(data, box):
    """The pixels of the box, or the error's text."""
    try:
        return decode_box(data, lambda height, width: box)[0].tobytes()
    except ValueError as error:
        return str(error)


def expected_outcome(data, box):
    top, left, height, width = box
    try:
        return whole(data)[top : top + height, left : left + width].tobytes()
    except UnidentifiedImageError:
        return f"cannot decode an image from {len(data)} bytes: Pillow knows no such format"
    except Exception as error:
        return f"cannot decode an image from {len(data)} bytes: {error}"


@pytest.mark.parametrize("interval", [0, 2])
def test_a_truncated_file_is_an_error_wherever_the_box_lies(interval):
    data = encode(60, 70, interval=interval)
    for size in range(data.index(b"\xff\xda") + 14, len(data), 7):
        expected = f"cannot decode an image from {size} bytes: image file is truncated"
        assert str(outcome(data[:size], Box(0, 0, 1, 1))).startswith(expected)


@pytest.mark.parametrize("end", [b"", b"\xff", b"\xff\xd0", b"\xff\xfe\0\2\xff\xd9"])
def test_files_that_do_not_end_with_their_scan(end):
    data = MARKED[:-2] + end
    for box in (Box(0, 0, 1, 1), Box(0, 0, 96, 160)):
        assert outcome(data, box) == expected_outcome(data, box)


def test_what_is_no_image_is_an_error():
    with pytest.raises(ValueError, match=r"^cannot decode an image from 9 bytes: Pillow knows no such format$"):
        decode_box(b"not a jpg", lambda height, width: Box(0, 0, 1, 1))


def test_a_header_that_claims_too_many_pixels():
    data = encode(60, 70)
    at = data.index(b"\xff\xc0") + 5
    with pytest.raises(ValueError, match="exceeds limit of 178956970 pixels"):
        decode_box(data[:at] + b"\xff\xdc\xff\xdc" + data[at + 4 :], lambda height, width: Box(0, 0, height, width))


@pytest.mark.parametrize("number", [0, 7, 12, 28])
@pytest.mark.parametrize(
    "instead", [b"", b"\xff\xd3", b"\xff\xd5", b"\xff\xd9", b"\xff\x00", b"=\xff\xfe\0\2", b"=\xff\xd5", b"=="]
)
@pytest.mark.parametrize("box", [Box(33, 65, 14, 30), Box(0, 0, 96, 160)])
def test_restart_markers_that_are_not_as_they_should(number, instead, box):
    at = MARKERS[number]
    data = MARKED[:at] + instead.replace(b"=", MARKED[at : at + 2]) + MARKED[at + 2 :]
    assert outcome(data, box) == expected_outcome(data, box)


@given(st.sampled_from([MARKED, encode(40, 50, "4:2:2"), encode(40, 50, "grey", 1)]), st.data())
def test_flipped_bits_have_the_same_outcome(data, draw):
    flips = draw.draw(st.lists(st.integers(16, 8 * len(data) - 1), min_size=1, max_size=3))
    broken = bytearray(data)
    for flip in flips:
        broken[flip // 8] ^= 1 << flip % 8
    box = Box(draw.draw(st.integers(0, 20)), draw.draw(st.integers(0, 20)), 15, 20)
    size = has_crop_decode() and crop._crop_decode.read_size(broken)
    if not size or (size[0] >= 40 and size[1] >= 50 and size[0] * size[1] < 1_000_000):
        assert outcome(bytes(broken), box) == expected_outcome(bytes(broken), box)


@needs_crop_decode
def test_no_memory_is_left_behind():
    tidy = encode(320, 320, "4:4:4", interval=1)
    files = tidy, garbled(tidy, {0}), tidy[:-1] + b"\xd0"
    process = psutil.Process()
    rounds = []
    for _ in range(3):
        for _ in range(600):
            decoded = [crop._crop_decode.decode(data, 30, 200, 60, 100) for data in files]
            assert [one is None for one in decoded] == [False, True, True]
        rounds.append(process.memory_info().rss)
    assert rounds[-1] - rounds[0] < 6 << 20  # what is allocated 1200 times has 12 kilobytes and more


def test_threads():
    data = [encode(200, 300, sampling, interval=1) for sampling in SAMPLINGS]
    wanted = [whole(one)[20:180, 30:250] for one in data]
    wrong = []

    def work(number):
        for turn in range(60):
            one = (number + turn) % len(data)
            decoded, _ = decode_box(data[one], lambda height, width: Box(20, 30, 160, 220))
            if not np.array_equal(decoded, wanted[one]):
                wrong.append(one)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
