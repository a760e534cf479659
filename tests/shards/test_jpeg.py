"""The frame of JPEG files, as encoders wrote them and broken, and restart markers that change no coefficient."""

import io
import os
import shutil
import struct

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.errors import UserError
from shards.jpeg import check_jpegtran, exif_orientation, insert_restart_markers, read_frame, restart_interval

needs_jpegtran = pytest.mark.skipif(
    shutil.which("jpegtran") is None, reason="jpegtran is not on PATH (Debian: libjpeg-turbo-progs)"
)


def jpeg(size=(50, 35), mode="RGB", seed=0, **options):
    """Noise, as a JPEG of `size` = (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def exif(order, orientation, kind=3):
    """EXIF data of one entry; `order` as struct names it."""
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order]
    entry = struct.pack(order + "HHIHH", 0x0112, kind, 1, orientation, 0)
    return b"Exif\0\0" + magic + struct.pack(order + "IH", 8, 1) + entry + bytes(4)


def segment(marker, parameters):
    return bytes((0xFF, marker)) + (len(parameters) + 2).to_bytes(2, "big") + parameters


def after_start(data, *inserted):
    """`data` with more bytes after SOI."""
    return data[:2] + b"".join(inserted) + data[2:]


def patched(data, marker, offset, value):
    """`data` with other bytes at `offset` behind a marker."""
    start = data.index(bytes((0xFF, marker))) + offset
    return data[:start] + value + data[start + len(value) :]


# --- frames


@pytest.mark.parametrize(
    ("options", "sampling", "process", "mcus_per_row"),
    [
        ({"subsampling": "4:2:0"}, ((2, 2), (1, 1), (1, 1)), 0, 4),
        ({"subsampling": "4:2:2"}, ((2, 1), (1, 1), (1, 1)), 0, 4),
        ({"subsampling": "4:4:4"}, ((1, 1), (1, 1), (1, 1)), 0, 7),
        ({"progressive": True}, ((2, 2), (1, 1), (1, 1)), 2, 4),
        ({"mode": "L"}, ((1, 1),), 0, 7),
        ({"mode": "CMYK"}, ((1, 1),) * 4, 0, 7),
    ],
)
def test_a_frame(options, sampling, process, mcus_per_row):
    frame = read_frame(jpeg((50, 35), **options))
    assert (frame.width, frame.height, frame.precision) == (50, 35, 8)
    assert (frame.sampling, frame.process, frame.mcus_per_row) == (sampling, process, mcus_per_row)
    assert (frame.restart_interval, frame.orientation) == (0, 1)


def test_the_mcu_of_one_component_is_a_block():
    data = patched(jpeg((50, 35), "L"), 0xC0, 11, b"\x22")
    assert read_frame(data).sampling == ((2, 2),)
    assert read_frame(data).mcus_per_row == 7


def test_the_restart_interval_of_a_frame():
    assert read_frame(jpeg(restart_marker_blocks=3)).restart_interval == 3


def test_bytes_between_segments_are_passed_over():
    plain = jpeg()
    untidy = after_start(plain, b"\xff\xff\xff", segment(0xFE, b"comment"), b"stray\xff\x00", b"\xff\x01\xff\xd0\xff")
    assert read_frame(untidy) == read_frame(plain)


def test_a_thumbnail_is_not_the_image():
    data = after_start(jpeg((50, 35)), segment(0xE1, b"Exif\0\0" + jpeg((16, 12))))
    assert (read_frame(data).width, read_frame(data).height) == (50, 35)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(order, orientation):
    data = exif(order, orientation)
    assert exif_orientation(data) == exif_orientation(data.removeprefix(b"Exif\0\0")) == orientation
    assert read_frame(after_start(jpeg(), segment(0xE1, b"http://ns.adobe.com"), segment(0xE1, data))).orientation == (
        orientation
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        exif("<", 0),
        exif("<", 9),
        exif(">", 6, kind=2),
        exif("<", 6)[:-8],
        exif("<", 6)[:12],
        b"Exif\0\0II*\0" + b"\xff" * 20,
        b"Exif\0\0II*\0" + struct.pack("<IH", 8, 65535),
    ],
    ids=len,
)
def test_broken_orientations_are_none(data):
    assert exif_orientation(data) == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "does not begin with the marker SOI"),
        (b"\xff\xd8", "ends before its first scan"),
        (b"\xff\xd8" + b"\xff" * 1_000_000, "ends before its first scan"),
        (b"\xff\xd8\xff\xd9" + jpeg()[2:], "ends before its first scan"),
        (b"\xff\xd8\xff\xe0\x00\x01" + bytes(9), "segment e0 at byte 2 is cut short"),
        (b"\xff\xd8\xff\xe0\xff\xff", "segment e0 at byte 2 is cut short"),
        (b"\xff\xd8\xff\xe0\x00", "segment e0 at byte 2 is cut short"),
        (b"\xff\xd8" + b"\xff\x01" * 100_000 + jpeg()[2:], "more than 4096 segments"),
        (b"\xff\xd8" + segment(0xDA, b""), "no frame header"),
        (after_start(jpeg(), segment(0xC0, b"\x08\0\x01\0\x01\x01\x01\x11\0")), "two frame headers"),
        (patched(jpeg(), 0xC0, 2, b"\x00\x0b"), "frame header has the wrong length"),
        (after_start(jpeg(), segment(0xC0, b"\x08\0")), "frame header has the wrong length"),
        (patched(jpeg((50, 35)), 0xC0, 5, b"\0\0"), "its frame is 50x0"),
        (patched(jpeg((50, 35)), 0xC0, 7, b"\0\0"), "its frame is 0x35"),
        (patched(jpeg(), 0xC0, 11, b"\x50"), r"sampling factors are \(\(5, 0\)"),
        (after_start(jpeg(), segment(0xC0, b"\x08\0\x01\0\x01\x00")), r"sampling factors are \(\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "data",
)
def test_malformed_headers(data, reason):
    with pytest.raises(ValueError, match=reason):
        read_frame(data)


def test_every_cut_header_is_malformed():
    data = jpeg()
    scan = data.index(b"\xff\xda") + 14
    assert read_frame(data[:scan]) == read_frame(data)
    for size in range(scan):
        with pytest.raises(ValueError, match=r"."):
            read_frame(data[:size])


@given(st.integers(2, 620), st.binary(min_size=1, max_size=4))
def test_damage_is_a_frame_or_a_value_error(offset, damage):
    data = jpeg()
    try:
        frame = read_frame(data[:offset] + damage + data[offset + len(damage) :])
    except ValueError:
        return
    assert 0 < frame.width < 65536
    assert 0 < frame.height < 65536
    assert frame.mcus_per_row > 0


# --- restart markers


def test_intervals():
    expected = {
        1: 1,
        2: 2,
        6: 6,
        7: 7,
        8: 4,
        9: 3,
        11: 1,
        12: 4,
        14: 7,
        16: 4,
        18: 6,
        21: 3,
        22: 2,
        25: 5,
        31: 1,
        32: 4,
    }
    assert {number: restart_interval(number) for number in expected} == expected


def test_an_interval_is_the_nearest_divisor():
    for number in range(1, 2000):
        divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
        assert restart_interval(number) == min(divisors, key=lambda divisor: (abs(divisor - 5), divisor))


def markers_of(data):
    """The numbers of the restart markers in the scan: every other FF is followed by 00."""
    scan = data[data.index(b"\xff\xda") :]
    return [scan[i + 1] - 0xD0 for i in range(len(scan) - 1) if scan[i] == 0xFF and 0xD0 <= scan[i + 1] <= 0xD7]


@needs_jpegtran
@pytest.mark.parametrize(
    ("size", "options", "interval"),
    [
        ((500, 33), {}, 4),
        ((500, 33), {"subsampling": "4:2:2"}, 4),
        ((501, 31), {"subsampling": "4:4:4"}, 3),
        ((97, 31), {"mode": "L"}, 1),
        ((496, 16), {"optimize": True}, 1),
        ((80, 64), {"keep_rgb": True}, 5),
        ((80, 64), {"restart_marker_blocks": 1}, 5),
        ((1, 1), {}, 1),
    ],
)
def test_restart_markers_change_no_pixel(size, options, interval):
    data = jpeg(size, **options)
    marked = insert_restart_markers(data)
    frame = read_frame(marked)
    assert frame.restart_interval == interval
    mcu_height = 8 * frame.sampling[0][1] if len(frame.sampling) > 1 else 8
    num_mcus = frame.mcus_per_row * -(-size[1] // mcu_height)
    assert markers_of(marked) == [number % 8 for number in range(num_mcus // interval - 1)]
    np.testing.assert_array_equal(simplejpeg.decode_jpeg(marked), simplejpeg.decode_jpeg(data))
    pillow = [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in (marked, data)]
    np.testing.assert_array_equal(*pillow)
    assert insert_restart_markers(marked) is marked


@needs_jpegtran
def test_restart_markers_cost_few_bytes_whatever_the_huffman_tables():
    for options in ({}, {"optimize": True}):
        data = jpeg((500, 375), **options)
        assert len(insert_restart_markers(data)) < 1.02 * len(data)


@needs_jpegtran
def test_restart_markers_drop_metadata():
    profile = bytes(range(256)) * 8
    data = after_start(jpeg((80, 64), icc_profile=profile, comment="words"), segment(0xE1, exif("<", 1)))
    marked = insert_restart_markers(data)
    assert profile in data
    for part in (profile, b"words", b"Exif", b"ICC_PROFILE"):
        assert part not in marked


@pytest.mark.parametrize(
    "data",
    [
        jpeg(progressive=True),
        jpeg((80, 64), restart_marker_blocks=5),
        patched(jpeg(), 0xC0, 1, b"\xc9"),  # arithmetic
        patched(jpeg(), 0xC0, 4, b"\x0c"),  # 12 bits
    ],
)
def test_where_restart_markers_are_not_inserted(data):
    assert insert_restart_markers(data) is data


@needs_jpegtran
@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_restart_markers_of_a_truncated_image(keep):
    data = jpeg((80, 64))
    with pytest.raises(ValueError, match="jpegtran: Premature end of JPEG file"):
        insert_restart_markers(data[: int(keep * len(data))])


def test_a_missing_jpegtran(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    expected = "program jpegtran, which is not on PATH: install the Debian package libjpeg-turbo-progs"
    with pytest.raises(UserError, match=expected):
        check_jpegtran()
    with pytest.raises(UserError, match=expected):
        insert_restart_markers(jpeg())


def test_another_jpegtran(tmp_path, monkeypatch):
    program = tmp_path / "jpegtran"
    program.write_text("#!/bin/sh\nexec cat\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    check_jpegtran()
    with pytest.raises(UserError, match=r"jpegtran on PATH is not libjpeg-turbo's: it made Frame.*libjpeg-turbo-progs"):
        insert_restart_markers(jpeg())
