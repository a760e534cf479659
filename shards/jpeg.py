"""JPEG files as marker segments (ITU-T T.81, annex B): the frame header, and restart markers, without decoding."""

import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace

from shards.errors import UserError

_SOI = b"\xff\xd8"
_STANDALONE = {0x01, *range(0xD0, 0xD9)}  # TEM, RSTn, SOI: no parameters follow
_SOF = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_EOI, _SOS, _DRI, _APP1 = 0xD9, 0xDA, 0xDD, 0xE1
# Fill bytes (0xFF) and stray ones before a marker are passed over, as decoders do.
_MARKER = re.compile(rb"\xff([^\x00\xff])")
_MAX_SEGMENTS = 4096  # real files have up to some hundreds; a file of nothing but markers must not cost minutes
_ORIENTATION, _SHORT = 0x0112, 3  # of EXIF: the tag and its type
_TARGET_INTERVAL = 5  # MCUs; the least decoding for random crops, measured (spec/imagenet.md)
_JPEGTRAN = "jpegtran"
_JPEGTRAN_SECONDS = 120
_REMEDY = "install the Debian package libjpeg-turbo-progs, or do without restart markers"


@dataclass(frozen=True, slots=True)
class Frame:
    """What a JPEG file says of its image before the first scan; width and height in pixels, as stored.

    `process` is the n of its SOFn marker: 0 baseline, 1 extended sequential, 2 progressive, these Huffman-coded.
    `sampling`: the horizontal and vertical factor of each component. `restart_interval`: MCUs between restart
    markers, 0 for none. `orientation`: EXIF's, 1 to 8.
    """

    width: int
    height: int
    process: int
    precision: int
    sampling: tuple[tuple[int, int], ...]
    restart_interval: int
    orientation: int

    @property
    def mcus_per_row(self) -> int:
        """Of an interleaved scan; the MCU of a single component is one block, whatever its factors (A.2.2)."""
        blocks = max(horizontal for horizontal, _ in self.sampling) if len(self.sampling) > 1 else 1
        return -(-self.width // (8 * blocks))


def read_frame(data: bytes) -> Frame:
    """The frame of a JPEG file, from the segments before its first scan; ValueError says how they are malformed."""
    if not data.startswith(_SOI):
        raise ValueError("it does not begin with the marker SOI")
    header, restart_interval, orientation = None, 0, 1
    for marker, start, end in _segments(data):
        if marker in _SOF:
            if header is not None:
                raise ValueError("it has two frame headers")
            header = _frame_header(data[start:end])
            process = marker - 0xC0
        elif marker == _DRI:
            restart_interval = int.from_bytes(data[start : start + 2], "big")
        elif marker == _APP1 and orientation == 1:
            orientation = exif_orientation(data[start:end])
    if header is None:
        raise ValueError("no frame header comes before its first scan")
    width, height, precision, sampling = header
    return Frame(width, height, process, precision, sampling, restart_interval, orientation)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of the parameters of each segment, the first scan's header being the last."""
    offset = len(_SOI)
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, offset)
        if found is None or found[1][0] == _EOI:
            raise ValueError("it ends before its first scan")
        marker, offset = found[1][0], found.end()
        if marker in _STANDALONE:
            continue
        end = offset + int.from_bytes(data[offset : offset + 2], "big")
        if not offset + 2 <= end <= len(data):
            raise ValueError(f"its segment {marker:02x} at byte {offset - 2} is cut short")
        yield marker, offset + 2, end
        if marker == _SOS:
            return
        offset = end
    raise ValueError(f"it has more than {_MAX_SEGMENTS} segments before its first scan")


def _frame_header(parameters: bytes) -> tuple[int, int, int, tuple[tuple[int, int], ...]]:
    if len(parameters) < 6 or len(parameters) != 6 + 3 * parameters[5]:
        raise ValueError("its frame header has the wrong length")
    precision, height, width = struct.unpack_from(">BHH", parameters)
    sampling = tuple((factors >> 4, factors & 15) for factors in parameters[7::3])
    if not width or not height:
        raise ValueError(f"its frame is {width}x{height}")
    if not sampling or not all(1 <= factor <= 4 for factors in sampling for factor in factors):
        raise ValueError(f"its sampling factors are {sampling}")
    return width, height, precision, sampling


def exif_orientation(exif: bytes) -> int:
    """The orientation (1 to 8) in EXIF data, with or without their prefix; 1 where there is none or they are broken."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (num_entries,) = struct.unpack_from(order + "H", tiff, directory)
        for number in range(num_entries):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * number)
            if tag == _ORIENTATION:
                return value if kind == _SHORT and 1 <= value <= 8 else 1
    except struct.error:  # it points outside
        pass
    return 1


def restart_interval(mcus_per_row: int) -> int:
    """The MCUs between restart markers: the divisor of `mcus_per_row` nearest 5, the smaller of two that are as near.

    So restart segments never cross from row to row. For a prime above 9 it is 1.
    """
    divisors = (number for number in range(1, 2 * _TARGET_INTERVAL) if mcus_per_row % number == 0)
    return min(divisors, key=lambda divisor: abs(divisor - _TARGET_INTERVAL))


def insert_restart_markers(data: bytes) -> bytes:
    """The same coefficients with a restart marker every `restart_interval` MCUs, and without metadata (EXIF, ICC).

    The Huffman tables are made anew for the image: otherwise jpegtran writes the standard ones, which adds 3 % to a
    file that had better. Unchanged where those markers are there already, and where the image is not 8-bit
    Huffman-coded baseline or extended sequential (progressive, arithmetic, ...). ValueError for data that are malformed
    or that libjpeg warns of; UserError for a missing jpegtran.
    """
    frame = read_frame(data)
    interval = restart_interval(frame.mcus_per_row)
    if frame.process > 1 or frame.precision != 8 or frame.restart_interval == interval:
        return data
    transcoded = _jpegtran(data, "-copy", "none", "-optimize", "-restart", f"{interval}B")
    written = read_frame(transcoded)
    if written != replace(frame, process=written.process, restart_interval=interval, orientation=1):
        raise UserError(f"the {_JPEGTRAN} on PATH is not libjpeg-turbo's: it made {written} of {frame}; {_REMEDY}")
    return transcoded


def check_jpegtran() -> None:
    """UserError where restart markers cannot be inserted."""
    if shutil.which(_JPEGTRAN) is None:
        raise UserError(f"restart markers need the program {_JPEGTRAN}, which is not on PATH: {_REMEDY}")


def _jpegtran(data: bytes, *options: str) -> bytes:
    try:
        done = subprocess.run([_JPEGTRAN, *options], input=data, capture_output=True, timeout=_JPEGTRAN_SECONDS)
    except FileNotFoundError:
        check_jpegtran()
        raise
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{_JPEGTRAN} took longer than {_JPEGTRAN_SECONDS} seconds") from error
    if done.returncode:  # 2 for a warning, such as of data that are cut short
        raise ValueError(f"{_JPEGTRAN}: {done.stderr[-200:].decode(errors='replace').strip()}")
    return done.stdout
