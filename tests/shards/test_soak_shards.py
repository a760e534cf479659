"""Heavy trials of make_shards: kills at random moments, a disk that is really full, memory at two sizes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from shards.index import Index

ROOT = Path(__file__).parents[2]
KILLS = 20
pytestmark = pytest.mark.soak


def command(*arguments):
    return [sys.executable, "tools/make_shards.py", *(str(argument) for argument in arguments)]


def run(*arguments, **options):
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False, **options)


def archive(folder, path):
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(folder, folder.name)
    return path


@pytest.fixture
def photographs(tmp_path, image):
    """1,500 images of three classes that take some time to resize."""
    root = tmp_path / "photographs"
    data = [image(seed, "JPEG", (400, 300)) for seed in range(5)]
    for label in range(3):
        (root / f"c{label}").mkdir(parents=True)
        for number in range(500):
            (root / f"c{label}/{number:04d}.jpg").write_bytes(data[number % 5])
    return root


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_killed_at_random_and_resumed(photographs, files_of, tmp_path, kind):
    """In place from folders, and from a gzip archive through spools."""
    source = archive(photographs, tmp_path / "photographs.tar.gz") if kind == "tar" else photographs
    rest = ("--split", "train", "--shard-size", 50, "--resize", "short:64", "--minival", "10%", "--workers", 2)
    start = time.monotonic()
    assert run(kind, source, tmp_path / "undisturbed", *rest).returncode == 0
    seconds = time.monotonic() - start
    expected = files_of(tmp_path / "undisturbed")
    draws = random.Random(0)
    survived = 0
    for number in range(KILLS):
        out = tmp_path / f"killed{number}"
        process = subprocess.Popen(command(kind, source, out, *rest), cwd=ROOT, stderr=subprocess.DEVNULL)
        try:
            process.wait(draws.uniform(0.05, 0.95) * seconds)
            survived += 1
        except subprocess.TimeoutExpired:
            process.kill()
            assert process.wait() == -signal.SIGKILL
        done = run(kind, source, out, *rest)
        assert done.returncode == 0, done.stderr
        assert files_of(out) == expected
        shutil.rmtree(out)
    print(f"\n{kind}: {KILLS - survived} of {KILLS} runs of {seconds:.1f} s were killed, all resumed to the same bytes")
    assert survived < KILLS / 2


@pytest.mark.parametrize("in_order", [False, True])
def test_a_full_disk(photographs, files_of, tmp_path, in_order):
    """A tmpfs with room for most of the shards, as the estimate allows; then with room for all."""
    rest = ("--split", "train", "--shard-size", 100, "--workers", 2, *["--in-order"] * in_order)
    assert run("folder", photographs, tmp_path / "undisturbed", *rest).returncode == 0
    needed = Index.load(tmp_path / "undisturbed").split("train").num_bytes
    disk = tmp_path / "disk"
    disk.mkdir()
    size = int(0.9 * needed)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        more = run("folder", photographs, disk / "out", *rest, "--resize", "squash:400")
        assert more.returncode == 2
        assert "the shards need about " in more.stderr
        assert {path.name for path in (disk / "out").iterdir()} == {".lock"}
        done = run("folder", photographs, disk / "out", *rest)
        assert done.returncode == 2
        assert "No space left on device (" in done.stderr
        assert "Make room or choose another directory, then run the same command again." in done.stderr
        assert not list((disk / "out").glob("*.tmp"))
        assert not (disk / "out/index.json").exists()
        subprocess.run(["mount", "-o", f"remount,size={3 * needed}", disk], check=True)
        assert run("folder", photographs, disk / "out", *rest).returncode == 0
        assert files_of(disk / "out") == files_of(tmp_path / "undisturbed")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_memory_does_not_grow_with_the_dataset(tmp_path, image):
    peaks = {num: peak_kib(tmp_path / str(num), num, image(0)) for num in (10_000, 100_000)}
    print(f"\npeak memory: {', '.join(f'{kib / 1024:.1f} MiB at {num:,} images' for num, kib in peaks.items())}")
    # 16 bytes an image is what the listing may hold at once.
    assert peaks[100_000] - peaks[10_000] < 12 * 1024


PEAK = """
import re, runpy, sys
assert runpy.run_path("tools/make_shards.py")["main"](sys.argv[1:]) == 0
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def peak_kib(root, num_images, data):
    """The peak resident size of make_shards in one process, as the kernel saw it."""
    for label in range(100):
        (root / f"source/c{label:02d}").mkdir(parents=True)
        first = root / f"source/c{label:02d}/0.jpg"
        first.write_bytes(data)
        for number in range(1, num_images // 100):
            os.link(first, root / f"source/c{label:02d}/{number}.jpg")
    arguments = ["folder", root / "source", root / "out", "--split", "train", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads((root / "out/train.report.json").read_bytes())["written"] == num_images
    shutil.rmtree(root)
    return int(done.stdout.split()[-1])
