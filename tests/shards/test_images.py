"""What becomes of images: which are copied, which are encoded anew, to which pixels, and which are refused."""

import gzip
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps, PngImagePlugin

from shards import raster
from shards.errors import UserError
from shards.images import BadImage, ImageHeader, ImageOptions, prepare, read_header
from shards.jpeg import read_frame

needs_jpegtran = pytest.mark.skipif(
    shutil.which("jpegtran") is None, reason="jpegtran is not on PATH (Debian: libjpeg-turbo-progs)"
)
KEEP = ImageOptions()


def photo(size, mode="RGB"):
    """Like a photograph, more detail the coarser: noise at every octave. `size` = (width, height)."""
    rng = np.random.default_rng(0)
    total = np.zeros((size[1], size[0], 3), np.float32)
    for octave in range(1, 9):
        noise = Image.fromarray(rng.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
        total += np.asarray(noise.resize(size, Image.Resampling.BICUBIC), np.float32) / 2**octave
    return Image.fromarray(np.clip(total, 0, 255).astype(np.uint8)).convert(mode)


def encode(image, image_format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def sixteen_bit(shape):
    values = np.linspace(0, 65535, int(np.prod(shape))).astype(np.uint16).reshape(shape)
    return cv2.imencode(".png", values)[1].tobytes()


def pixels(data):
    """Pillow's, which warns where a palette with transparency does not become RGBA first."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray((image.convert("RGBA") if image.mode == "P" else image).convert("RGB")).astype(int)


def is_plain(prepared):
    """Whether it is RGB of 8 bits without metadata."""
    with Image.open(io.BytesIO(prepared.data)) as image:
        extra = set(image.info) & {"exif", "icc_profile", "comment", "xmp", "dpi", "transparency"}
        return image.mode == "RGB" and not extra and image.size == (prepared.width, prepared.height)


# --- copies


COPIED = {
    "jpg": encode(photo((50, 35))),
    "progressive": encode(photo((50, 35)), progressive=True),
    "444": encode(photo((50, 35)), subsampling="4:4:4"),
    "grey": encode(photo((50, 35), "L")),
    "png": encode(photo((50, 35)), "PNG"),
    "grey png": encode(photo((50, 35), "L"), "PNG"),
    "palette png": encode(photo((50, 35), "P"), "PNG"),
    "palette with transparency": encode(photo((50, 35), "P"), "PNG", transparency=bytes(range(256))),
    "png with alpha": encode(photo((50, 35), "RGBA"), "PNG"),
    "webp": encode(photo((50, 35)), "WEBP"),
    "webp with alpha": encode(photo((50, 35), "RGBA"), "WEBP", lossless=True),
    "one pixel": encode(photo((1, 1))),
}


@pytest.mark.parametrize("kind", COPIED)
@pytest.mark.parametrize("verify", [False, True])
def test_copies_are_untouched(kind, verify):
    data = COPIED[kind]
    prepared = prepare(data, "name", ImageOptions(verify=verify))
    assert prepared.data is data
    assert prepared.changes == ""
    with Image.open(io.BytesIO(data)) as image:
        assert (prepared.width, prepared.height) == image.size
        assert prepared.field == {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[image.format]
    assert read_header(data) == ImageHeader(prepared.field, prepared.width, prepared.height)


@pytest.mark.parametrize("kind", COPIED)
def test_every_kind_can_be_resized_and_keeps_its_type(kind):
    data = COPIED[kind]
    prepared = prepare(data, "name", ImageOptions("short:16"))
    small = (1, 1) if kind == "one pixel" else (22, 16)
    assert (prepared.width, prepared.height) == small
    assert prepared.field == read_header(data).field
    assert kind == "one pixel" or is_plain(prepared)


# --- what must be encoded anew


def test_cmyk_becomes_rgb():
    data = encode(photo((50, 35), "CMYK"), quality=95)
    prepared = prepare(data, "n03062245_4620.JPEG", KEEP)
    assert prepared.changes == "CMYK to RGB"
    assert is_plain(prepared)
    assert abs(pixels(prepared.data) - pixels(data)).mean() < 3


@pytest.mark.parametrize(("image_format", "name"), [("PNG", "n02105855_2933.JPEG"), ("WEBP", "a.jpg")])
def test_what_is_named_jpeg_becomes_one(image_format, name):
    prepared = prepare(encode(photo((50, 35)), image_format), name, KEEP)
    assert (prepared.field, prepared.changes) == ("jpg", f"{image_format} to JPEG")
    assert prepared.data.startswith(b"\xff\xd8")
    assert is_plain(prepared)


def test_a_jpeg_stays_one_whatever_its_name():
    assert prepare(COPIED["jpg"], "a.png", KEEP).data is COPIED["jpg"]


@pytest.mark.parametrize(
    ("shape", "changes"),
    [((40, 60), "16-bit grey to RGB"), ((40, 60, 3), "16-bit RGB to RGB"), ((1, 1), "16-bit grey to RGB")],
)
def test_sixteen_bits_become_eight(shape, changes):
    data = sixteen_bit(shape)
    prepared = prepare(data, "a.png", KEEP)
    assert (prepared.field, prepared.changes) == ("png", changes)
    assert is_plain(prepared)
    wide = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED).reshape(*shape[:2], -1)[:, :, ::-1]
    np.testing.assert_array_equal(pixels(prepared.data), np.broadcast_to(wide >> 8, (*shape[:2], 3)))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(image_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo((50, 35)), image_format, exif=exif)
    prepared = prepare(data, "a", ImageOptions(quality=80))
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    upright.info.clear()
    assert prepared.data == (data if orientation == 1 else encode(upright, image_format, quality=80))
    assert prepared.changes == ("" if orientation == 1 else f"rotated by EXIF orientation {orientation}")
    assert (prepared.width, prepared.height) == upright.size
    resized = prepare(data, "a", ImageOptions("short:20"))
    assert (resized.width, resized.height) == ((28, 20) if orientation < 5 else (20, 28))
    reference = np.asarray(upright.resize((resized.width, resized.height), Image.Resampling.BICUBIC)).astype(int)
    assert abs(pixels(resized.data) - reference).mean() < 6


def test_broken_exif_is_no_harm():
    data = COPIED["jpg"]
    broken = data[:2] + b"\xff\xe1\x00\x16Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01" + data[2:]
    prepared = prepare(broken, "a", ImageOptions(verify=True))
    assert prepared.data is broken


def test_formats():
    for image_format, field in (("jpg", "jpg"), ("webp", "webp")):
        for kind, data in COPIED.items():
            prepared = prepare(data, "a.png", ImageOptions(format=image_format))
            assert prepared.field == field
            assert (prepared.data is data) == (read_header(data).field == field)
            assert is_plain(prepared) or prepared.data is data, kind
    changed = prepare(COPIED["palette png"], "a.JPEG", ImageOptions(format="webp"))
    assert changed.changes == "PNG to WEBP; palette to RGB"


@pytest.mark.parametrize("kind", ["palette with transparency", "png with alpha", "webp with alpha"])
def test_alpha_is_dropped_as_pillow_drops_it(kind):
    data = COPIED[kind]
    np.testing.assert_array_equal(raster.decode(data, read_header(data).field), pixels(data))


def test_encoded_jpegs():
    data = encode(photo((500, 375)))
    sizes = []
    for quality in (50, 90):
        prepared = prepare(data, "a", ImageOptions("short:256", quality=quality))
        sizes.append(len(prepared.data))
        assert is_plain(prepared)
        assert read_frame(prepared.data).sampling == ((2, 2), (1, 1), (1, 1))
        assert prepared.changes == "resized from 500x375"
    assert sizes[0] < 0.7 * sizes[1]


@pytest.mark.parametrize("size", [(341, 256), (17, 33), (1, 1)])
@pytest.mark.parametrize("restart_markers", [False, True])
def test_opencv_and_pillow_encode_to_the_same_bytes(size, restart_markers):
    image = np.asarray(photo(size))
    for quality in (1, 75, 90, 100):
        both = [raster.encode(image, "jpg", quality, restart_markers, with_opencv) for with_opencv in (False, True)]
        assert both[0] == both[1]


# --- gzip


def test_a_gzipped_jpeg():
    data = COPIED["jpg"]
    prepared = prepare(gzip.compress(data), "n02487347_1956.JPEG", KEEP)
    assert (prepared.data, prepared.field, prepared.changes) == (data, "jpg", "gunzipped")
    both = prepare(gzip.compress(COPIED["png"]), "a.JPEG", ImageOptions("short:16"))
    assert both.changes == "gunzipped; PNG to JPEG; resized from 50x35"


def test_bad_gzip():
    packed = gzip.compress(COPIED["jpg"])
    compressor = zlib.compressobj(1, wbits=31)
    mebibyte = bytes(1 << 20)
    bomb = b"".join(compressor.compress(mebibyte) for _ in range(65)) + compressor.flush()
    assert len(bomb) < 2_000_000
    for data, reason in (
        (packed[:-20], "gzip-compressed, and cut short"),
        (packed[:-8] + bytes(8), "gzip-compressed, and cannot be inflated .*incorrect data check"),
        (gzip.compress(packed), "neither JPEG, PNG nor WebP .it begins with 1f 8b"),
        (gzip.compress(b""), "the file is empty"),
        (bomb, "inflates to more than 67108864 bytes"),
    ):
        with pytest.raises(BadImage, match=reason):
            prepare(data, "a.JPEG", KEEP)


# --- resizing


@pytest.mark.parametrize(
    ("resize", "size", "expected"),
    [
        ("short:256", (500, 375), (341, 256)),
        ("short:256", (375, 500), (256, 341)),
        ("short:256", (300, 300), (256, 256)),
        ("short:256", (256, 999), None),
        ("short:256", (100, 999), None),
        ("short:256", (257, 257), (256, 256)),
        ("short:32", (1100, 33), (1066, 32)),
        ("squash:224", (500, 375), (224, 224)),
        ("squash:224", (224, 100), (224, 224)),
        ("squash:224", (224, 224), None),
        ("squash:224", (223, 223), None),
        ("squash:224", (1, 300), (224, 224)),
    ],
)
def test_sizes(resize, size, expected):
    data = encode(photo(size))
    prepared = prepare(data, "a", ImageOptions(resize))
    assert (prepared.width, prepared.height) == (expected or size)
    if expected is None:
        assert prepared.data is data
    else:
        assert prepared.changes == f"resized from {size[0]}x{size[1]}"
        assert is_plain(prepared)
    if resize.startswith("short") and expected:  # torchvision.transforms.functional._compute_resized_output_size
        assert max(expected) == int(int(resize[6:]) * max(size) / min(size))


PATHS = {
    "jpg": {},
    "progressive": {"progressive": True},
    "444": {"subsampling": "4:4:4"},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
    "png": {"image_format": "PNG"},
    "webp": {"image_format": "WEBP"},
}


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("size", [(500, 375), (641, 427), (1283, 861)])
def test_pixels_are_as_good_as_pillows(kind, size):
    options = dict(PATHS[kind])
    data = encode(photo(size, options.pop("mode", "RGB")), options.pop("image_format", "JPEG"), **options)
    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB")
    field = read_header(data).field
    for target in ((341, 256), (224, 224), (63, 41)):
        ours = raster.decode_resized(data, field, target)
        bicubic, lanczos = (
            np.asarray(rgb.resize(target, way)).astype(int)
            for way in (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
        )
        assert ours.shape == bicubic.shape
        assert abs(ours - bicubic).mean() < max(1.5, 1.5 * abs(lanczos - bicubic).mean())


def test_a_scaled_decode_is_not_shifted():
    """libjpeg rounds the sides up when it decodes to n/8; that must not move the picture by a fraction of a pixel."""
    width, height = 1283, 861
    waves = np.zeros((height, width, 3), np.uint8)
    waves[:, :, 0] = 127 + 100 * np.sin(2 * np.pi * np.arange(width) / 60)
    waves[:, :, 1] = 127 + 100 * np.sin(2 * np.pi * np.arange(height) / 60)[:, None]
    data = encode(Image.fromarray(waves), quality=98, subsampling="4:4:4")
    assert simplejpeg.decode_jpeg(data, min_width=200, min_height=134, min_factor=2).shape == (216, 321, 3)
    scaled = raster.decode_resized(data, "jpg", (100, 67)).astype(int)
    reference = np.asarray(Image.fromarray(waves).resize((100, 67), Image.Resampling.BOX)).astype(int)
    assert abs(scaled - reference)[:, :, :2].max() <= 8


def test_cmyk_is_converted_alike_whether_resized_or_not():
    data = encode(photo((500, 375), "CMYK"))
    expected = cv2.resize(raster.decode(data, "jpg"), (341, 256), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(raster.decode_resized(data, "jpg", (341, 256)), expected)


def test_growing_sides():
    stripes = np.zeros((400, 40, 3), np.uint8)
    stripes[::4] = stripes[3::4] = 255  # a side that shrinks without antialiasing would miss them
    data = encode(Image.fromarray(stripes), "PNG")
    squashed = raster.decode_resized(data, "png", (100, 100))
    assert abs(squashed.astype(int) - 128).max() <= 1
    image = photo((40, 30))
    grown = raster.decode_resized(encode(image, "PNG"), "png", (64, 64))
    reference = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert abs(grown - reference).mean() < 1


def test_averages_of_floats_are_those_of_bytes():
    image = np.asarray(photo((500, 375)))
    for size in ((341, 256), (250, 188), (499, 374)):
        expected = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(
            raster.decode_resized(encode(Image.fromarray(image), "PNG"), "png", size), expected
        )


HASH = """
import hashlib, pathlib, sys
from shards.images import ImageOptions, prepare
data = pathlib.Path(sys.argv[1]).read_bytes()
for resize in ("short:256", "squash:224", "squash:600"):
    print(hashlib.sha256(prepare(data, "a", ImageOptions(resize)).data).hexdigest())
import cv2
print(cv2.getNumThreads())
"""


def test_the_same_bytes_on_a_lesser_cpu(tmp_path):
    """Machines of one job may differ in what their CPUs can do."""
    (tmp_path / "a.jpg").write_bytes(encode(photo((1283, 501))))
    command = [sys.executable, "-c", HASH, str(tmp_path / "a.jpg")]
    lesser = {"OPENCV_CPU_DISABLE": "AVX512_SKX,AVX2,FMA3,FP16,AVX", "OPENCV_IPP": "disabled", "JSIMD_FORCENONE": "1"}
    both = [
        subprocess.run(command, env=os.environ | extra, capture_output=True, text=True, check=True).stdout.split()
        for extra in ({}, lesser)
    ]
    assert both[0] == both[1]
    assert len(set(both[0])) == 4
    assert both[0][-1] == "1"


# --- what is cut short, untidy, or no image


def test_truncated_images_are_found_where_they_are_decoded():
    for kind, data in COPIED.items():
        cut = data[: len(data) - max(20, len(data) // 3)]
        if kind == "one pixel" or kind.startswith("webp"):
            continue
        assert prepare(cut, "a", KEEP).data is cut
        for options in (ImageOptions(verify=True), ImageOptions("short:16"), ImageOptions(format="webp")):
            with pytest.raises(BadImage, match=r"it cannot be decoded .*(truncated|broken)"):
                prepare(cut, "a", options)
    with pytest.raises(BadImage, match="its WEBP header cannot be read"):  # which says how long the file is
        prepare(COPIED["webp"][:-1], "a", KEEP)


@needs_jpegtran
def test_truncated_images_are_found_by_restart_markers():
    data = COPIED["jpg"]
    with pytest.raises(BadImage, match=r"it cannot be decoded \(OSError: image file is truncated"):
        prepare(data[:-50], "a", ImageOptions(restart_markers=True))


@needs_jpegtran
def test_an_untidy_image_is_kept_as_pillow_keeps_it():
    data = encode(photo((200, 100)))
    middle = len(data) // 2
    untidy = data[:middle] + b"\x55" * 12 + data[middle + 12 :]
    with pytest.raises(ValueError, match="Corrupt JPEG data"):
        simplejpeg.decode_jpeg(untidy)
    for options in (ImageOptions(verify=True), ImageOptions(restart_markers=True)):
        assert prepare(untidy, "a", options).data is untidy
    assert is_plain(prepare(untidy, "a", ImageOptions("short:50")))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def claiming(data, marker, offset, value):
    start = data.index(marker) + offset
    return data[:start] + value + data[start + len(value) :]


LOSSLESS_WEBP = encode(photo((16, 16)), "WEBP", lossless=True)
BOMBS = [
    (png(100_001, 1_000), "it is 100001x1000, and 100000000 pixels are the limit"),
    (png(2**31 - 1, 2**31 - 1), "PNG header cannot be read .*DecompressionBombError"),
    (png(9, 9, chunk(b"IHDR", png(50_000, 3_000)[16:29])), "it is 50000x3000, and 100000000"),
    (claiming(COPIED["jpg"], b"\xff\xc0", 5, b"\xff\xff\xff\xff"), "it is 65535x65535, and 100000000"),
    (claiming(LOSSLESS_WEBP, b"VP8L", 9, struct.pack("<I", 12_999 << 14 | 12_999)), "it is 13000x13000, and 100000000"),
    (claiming(LOSSLESS_WEBP, b"VP8L", 9, b"\xff\xff\xff\x0f"), "WEBP header cannot be read .*DecompressionBombError"),
    (png(9, 9, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 27)))), "PNG header cannot be read .*too large"),
]


@pytest.mark.parametrize(("data", "reason"), BOMBS, ids=range(len(BOMBS)))
def test_bombs(data, reason):
    for options in (KEEP, ImageOptions("short:256")):
        with pytest.raises(BadImage, match=reason):
            prepare(data, "a.png", options)


MEMORY = """
import pathlib, resource, sys
from shards.images import BadImage, ImageOptions, prepare
from PIL import Image
Image.init()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        prepare(path.read_bytes(), "a", ImageOptions())
    except BadImage:
        print("bad")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_bombs_take_no_memory(tmp_path):
    for number, (data, _) in enumerate(BOMBS):
        (tmp_path / str(number)).write_bytes(data)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    *bad, kilobytes = done.stdout.split()
    assert bad == ["bad"] * len(BOMBS)
    assert int(kilobytes) < 30_000


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"garbage of some length", r"neither JPEG, PNG nor WebP \(it begins with 67 61 72 62 61 67 65 20\)"),
        (encode(photo((9, 9)), "GIF"), r"neither JPEG, PNG nor WebP \(it begins with 47 49 46"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", r"its JPEG header cannot be read \(its segment e0 at byte 2 is cut short\)"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "its PNG header cannot be read"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "its WEBP header cannot be read"),
        (png(0, 9), "its PNG header cannot be read"),
        (
            claiming(COPIED["jpg"], b"\xff\xc0", 4, b"\x0c"),
            r"SOF0 with 3 components of 12 bits: only SOF0 to SOF2 with",
        ),
        (claiming(COPIED["jpg"], b"\xff\xc0", 1, b"\xc9"), "SOF9 with 3 components of 8 bits"),
        (
            b"\xff\xd8\xff\xc0\x00\x0e\x08\0\x09\0\x09\x02\x01\x11\0\x02\x11\0\xff\xda\x00\x02",
            "SOF0 with 2 components of 8 bits",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "data",
)
def test_what_is_no_image(data, reason):
    with pytest.raises(BadImage, match=reason):
        prepare(data, "a.jpg", KEEP)
    with pytest.raises(BadImage, match=reason):
        read_header(data)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_every_cut_header_has_a_reason(kind):
    data = COPIED[kind]
    for size in range(0, 60):
        with pytest.raises(BadImage, match=r"\w"):
            prepare(data[:size], "a", ImageOptions(verify=True))


def test_sides_that_a_format_cannot_hold():
    wide = encode(Image.new("RGB", (66_000, 2)), "PNG")
    with pytest.raises(
        BadImage, match=r"it cannot be encoded \(66000 pixels on a side, and JPEG holds 65500 at most\)"
    ):
        prepare(wide, "a.jpg", KEEP)
    with pytest.raises(BadImage, match=r"66000 pixels on a side, and WEBP holds 16383 at most"):
        prepare(wide, "a.png", ImageOptions(format="webp"))


def test_a_reason_crosses_processes():
    error = pickle.loads(pickle.dumps(BadImage("the file is empty")))
    assert (type(error), str(error)) == (BadImage, "the file is empty")


def test_text_in_a_png_is_no_harm():
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 1000, zip=True)
    data = encode(photo((9, 9)), "PNG", pnginfo=text)
    assert prepare(data, "a.png", KEEP).data is data


# --- restart markers


@needs_jpegtran
def test_restart_markers_in_copies():
    data = encode(photo((500, 375)), icc_profile=b"profile")
    prepared = prepare(data, "a.jpg", ImageOptions(restart_markers=True))
    assert prepared.changes == "restart markers inserted, metadata dropped"
    assert read_frame(prepared.data).restart_interval == 4
    np.testing.assert_array_equal(pixels(prepared.data), pixels(data))
    again = prepare(prepared.data, "a.jpg", ImageOptions(restart_markers=True))
    assert again.data is prepared.data
    assert again.changes == ""
    for kind in ("progressive", "png", "webp"):
        assert prepare(COPIED[kind], "a", ImageOptions(restart_markers=True)).changes == ""


def test_restart_markers_in_encoded_images():
    data = encode(photo((500, 375)))
    plain = prepare(data, "a.jpg", ImageOptions("short:256"))
    marked = prepare(data, "a.jpg", ImageOptions("short:256", restart_markers=True))
    assert marked.changes == "resized from 500x375; restart markers inserted"
    assert read_frame(marked.data).restart_interval == 2
    assert read_frame(plain.data).restart_interval == 0
    np.testing.assert_array_equal(pixels(marked.data), pixels(plain.data))
    assert prepare(data, "a.jpg", ImageOptions(format="webp", restart_markers=True)).changes == "JPEG to WEBP"


# --- options


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"resize": "256"}, "a resize of '256': give none, short:N or squash:N, such as short:256"),
        ({"resize": "short:"}, "a resize of 'short:'"),
        ({"resize": "short:-5"}, "a resize of 'short:-5'"),
        ({"resize": "short:15"}, "a resize to 15 pixels: N is from 16 to 4096"),
        ({"resize": "squash:4097"}, "a resize to 4097 pixels"),
        ({"quality": 0}, "a quality of 0: it is from 1 to 100"),
        ({"quality": 101}, "a quality of 101"),
        ({"format": "png"}, "an image format 'png': choose one of keep, jpg, webp"),
    ],
)
def test_bad_options(options, reason):
    with pytest.raises(UserError, match=reason):
        ImageOptions(**options)


def test_missing_tools_are_told_before_work(tmp_path, monkeypatch):
    ImageOptions("short:256").check_tools()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="program jpegtran, which is not on PATH: install the Debian package"):
        ImageOptions(restart_markers=True).check_tools()
    ImageOptions(format="jpg", verify=True).check_tools()


WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None
from shards.images import ImageOptions
ImageOptions(format="jpg", verify=True).check_tools()
try:
    ImageOptions("short:256").check_tools()
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_missing_library():
    done = subprocess.run([sys.executable, "-c", WITHOUT, "simplejpeg"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("UserError resizing images needs the package simplejpeg (")
    assert done.stdout.endswith("pip install 'vittm-pipeline[data]', or resize none\n")
