"""Input that means harm, through the command: a reason for each file, bounded memory, nothing outside OUT."""

import gzip
import io
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest

from shards.index import Index

ROOT = Path(__file__).parents[2]
MEASURED = """
import re, runpy, sys
code = runpy.run_path("tools/make_shards.py")["main"](sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
sys.exit(code)
"""
MAX_MIB = 250


def run(*arguments):
    """The command in one process; its exit code, stderr, and peak memory in MiB."""
    command = [sys.executable, "-c", MEASURED, *map(str, arguments), "--workers", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr, int(done.stdout.split()[-1]) / 1024


def png_bomb(side):
    """A PNG of `side` x `side` pixels in a few kilobytes, which really inflates to their size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def add(tar, name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def hostile(tmp_path, image):
    """A tar of two good images, and of files that must each be left out for a reason."""
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for number in range(2):
            add(tar, f"c0/{number}.jpg", image(number))
        add(tar, "../c0/outside.jpg", image(2))
        add(tar, "/tmp/c0/absolute.jpg", image(3))
        add(tar, "c0/symbolic.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "c0/hard.jpg", type=tarfile.LNKTYPE, linkname="c0/0.jpg")
        add(tar, "c0/device.jpg", type=tarfile.CHRTYPE)
        add(tar, "c0/empty.jpg")
        add(tar, "c0/0.jpg", image(4))
        add(tar, "c0/bomb.png", png_bomb(12_000))
        add(tar, "c0/gzipped.jpg", gzip.compress(bytes(80 << 20), 9))
        add(tar, "c0/\udcff\udcfe.jpg", image(5))
        add(tar, "c0/page.jpg", b"<html>404</html>")
    return path


REASONS = {
    "outside.jpg": "'..'",
    "absolute.jpg": "absolute",
    "symbolic.jpg": "link",
    "hard.jpg": "link",
    "device.jpg": "device",
    "empty.jpg": "empty",
    "c0/0.jpg": "its key 'c0_0' is that of another file of the split",
    "bomb.png": "100000000 pixels",
    "gzipped.jpg": "67108864",
    "\\udcff\\udcfe.jpg": "not UTF-8",
    "page.jpg": "neither JPEG, PNG nor WebP",
}


@pytest.mark.parametrize("way", [(), ("--in-order",), ("--resize", "short:64")])
def test_each_file_has_its_reason(hostile, tmp_path, way):
    outside = {path for path in tmp_path.rglob("*")}
    out = tmp_path / "out"
    code, errors, mib = run("tar", hostile, out, "--split", "train", "--max-bad", len(REASONS), *way)
    assert code == 0, errors
    files = json.loads((out / "train.report.json").read_bytes())["files"]
    assert len(files) == len(REASONS)
    for name, reason in REASONS.items():
        assert [file for file in files if name in file["file"] and reason in file["reason"]], (name, files)
    assert all(file["file"].isprintable() and file["reason"].isprintable() for file in files)
    assert Index.load(out).split("train").num_samples == 2
    assert {path for path in tmp_path.rglob("*") if out not in (path, *path.parents)} == outside
    assert mib < MAX_MIB


def test_a_header_that_claims_ten_gigabytes(tmp_path, image):
    path = tmp_path / "claim.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "c0/0.jpg", image(0))
        claim = tarfile.TarInfo("c0/huge.jpg")
        claim.size = 10 << 30
        tar.fileobj.write(claim.tobuf(tarfile.GNU_FORMAT))
    code, errors, mib = run("tar", path, tmp_path / "out", "--split", "train")
    assert code == 2
    assert "10737418240 bytes" in errors
    assert "download it again" in errors
    assert mib < MAX_MIB


@pytest.mark.parametrize("share", [0.3, 0.99])
def test_a_truncated_gzip(tmp_path, image, share):
    path = tmp_path / "cut.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for number in range(50):
            add(tar, f"c0/{number}.jpg", image(number))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    code, errors, mib = run("tar", path, tmp_path / "out", "--split", "train")
    assert code == 2
    assert "download it again" in errors
    assert not list((tmp_path / "out").glob("*.tar"))
    assert mib < MAX_MIB
