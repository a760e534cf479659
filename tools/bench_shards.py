"""How fast shards are written: ours against webdataset's ShardWriter and Pillow, and two workers against one.

Ours and the peers take turns on the same synthetic images, which lie in the page cache. Figures are medians: images a
second of CPU time, or of wall time for workers. Ours is all of `write`: listing, reading, checking, hashing, flushing
to disk, offsets and index. webdataset's writer gets its fields as bytes, which is its quickest way, with a width and
height from Pillow, and files that hash what passes through them, which is quicker than to read the shards again; once
they are opened as it does itself, and once ("buffered") with a buffer of 1 MiB, as ours.

Prints a table, and appends a JSON line.
"""

import argparse
import gzip
import io
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image
from tqdm import tqdm

from shards import durable
from shards.engine import Engine, open_engine
from shards.images import ImageOptions, prepare
from shards.sources.folders import ClassFolders
from shards.writing.options import WriteOptions
from shards.writing.writer import write
from tools.benchmarks import JPEGS, LARGE, ROOT, SMALL, append, header, make_images

SHARD_SIZE, NUM_IN_MEMORY = 1000, 200
BUFFERS = {"webdataset": -1, "webdataset, buffered": 1 << 20}
COPY, SHORT, SQUASH = "none", "short:256", "squash:224"
PACKAGES = ("numpy", "pillow", "simplejpeg", "opencv-python-headless", "webdataset")

CPU, WALL = 0, 1  # clocks
NUM_CORES = 8  # of the machine that hours are told for
IMAGES_1K, IMAGES_21K_P = 1_281_167 + 50_000, 11_060_223 + 522_500
WINTER21_BYTES, RESIZED_21K_BYTES = 1.1e12, 280e9  # of the archives, which are read twice

Run = Callable[[Path], object]  # gets a path where nothing is yet


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="of each size (default: 2000)")
    parser.add_argument("--repetitions", type=int, default=7, metavar="R", help="of each run (default: 7)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/shards.jsonl", metavar="FILE")
    options = parser.parse_args(arguments)
    if min(options.images, options.repetitions) < 1:
        parser.error(f"{options.images} images, {options.repetitions} repetitions: both must be at least 1")
    record = header("shards", "tools/bench_shards.py", arguments, PACKAGES)
    record["repetitions"] = options.repetitions
    with tempfile.TemporaryDirectory() as directory:
        record["summary"] = Bench(Path(directory), options.images, options.repetitions).run()
    append(record, options.output)
    return 0


def write_ours(folder: Path, out: Path, options: WriteOptions, engine: Engine, hashed: bool) -> None:
    """There is no option for unhashed shards: their files are of a class that only counts."""
    file_class = durable.HashedFile if hashed else _CountedFile
    with mock.patch.object(durable, "HashedFile", file_class), redirect_stderr(io.StringIO()):  # where progress goes
        write(ClassFolders(str(folder), "train"), out, options, engine)


class _CountedFile(durable.HashedFile):
    def write(self, data: bytes) -> int:
        self.num_bytes += len(data)
        return self._file.write(data)


def write_theirs(folder: Path, out: Path, buffering: int, hashed: bool) -> None:
    """The same samples, shuffled as well, by webdataset."""
    from webdataset import ShardWriter  # here, for it brings torch, and workers import this module

    out.mkdir()
    classes = enumerate(sorted(os.listdir(folder)))
    files = [(label, name, filename) for label, name in classes for filename in os.listdir(folder / name)]
    random.Random(0).shuffle(files)
    with ExitStack() as stack:  # ShardWriter leaves open what others have opened

        def opened(path: str) -> Any:
            file = stack.enter_context(open(path, "wb", buffering))
            return durable.HashedFile(file) if hashed else file

        with ShardWriter(f"{out}/%06d.tar", maxcount=SHARD_SIZE, encoder=False, opener=opened, verbose=0) as writer:
            for file in files:
                writer.write(_their_sample(folder, *file))


def _their_sample(folder: Path, label: int, class_name: str, filename: str) -> dict[str, str | bytes]:
    with open(f"{folder}/{class_name}/{filename}", "rb") as file:
        data = file.read()
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
    meta = {"changes": "", "filename": filename, "height": height, "width": width, "wnid": class_name}
    key = os.path.splitext(filename)[0]
    return {"__key__": key, "jpg": data, "cls": b"%d" % label, "json": json.dumps(meta).encode()}


def _reencode_all(task: Any, advance: Any) -> tuple[float, float]:
    """In a worker: seconds of CPU time and of wall time that it takes."""
    function, images, options = task[0], [path.read_bytes() for path in task[1]], task[2]
    cpu, wall = time.process_time(), time.perf_counter()
    for data in images:
        function(data, "n.JPEG", options)
    return time.process_time() - cpu, time.perf_counter() - wall


def resize_with_pillow(data: bytes, name: str, options: ImageOptions) -> bytes:
    kind, side = options.resize.split(":")
    pixels = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = (int(side) * n // (min(pixels.size) if kind == "short" else n) for n in pixels.size)
    buffer = io.BytesIO()
    pixels.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=options.quality)
    return buffer.getvalue()


@dataclass(frozen=True)
class Measured:
    """Runs that took turns, each through `amount` images or bytes: seconds of CPU time and of wall time of each."""

    what: str
    amount: int
    seconds: Mapping[str, Sequence[tuple[float, float]]]

    def rate(self, name: str, clock: int = CPU) -> float:
        return self.amount / statistics.median(pair[clock] for pair in self.seconds[name])

    def compare(self, ours: str, theirs: str, clock: int = CPU) -> dict[str, float]:
        """Both rates and their ratio, and the lowest and the highest ratio of a repetition."""
        turns = zip(self.seconds[ours], self.seconds[theirs], strict=True)
        ratios = [their_turn[clock] / our_turn[clock] for our_turn, their_turn in turns]
        rates = {name: self.rate(name, clock) for name in (ours, theirs)}
        found = {"ratio": rates[ours] / rates[theirs], "lowest": min(ratios), "highest": max(ratios)}
        columns = (*(f"{rate:>9,.0f}" for rate in rates.values()), *(f"{ratio:>9.2f}" for ratio in found.values()))
        print(f"{self.what:<32}{theirs:<22}", *columns, sep="", flush=True)
        return {name: round(number, 3) for name, number in {**rates, **found}.items()}


@dataclass(frozen=True)
class Bench:
    """All runs over `num_images` files of each size in `directory`, an empty one."""

    directory: Path
    num_images: int
    repetitions: int

    def run(self) -> dict[str, Any]:
        """The summary."""
        sizes = {name: make_images(self.directory / name, *jpeg, self.num_images) for name, jpeg in JPEGS.items()}
        print(f"{'images a second':<32}{'ours against':<22}{'ours':>9}{'theirs':>9}{'ratio':>9}{'from':>9}{'to':>9}")
        with open_engine("local", 1) as engine, open_engine("local", 2) as two:
            summary: dict[str, Any] = {
                "images": {name: {"number": self.num_images, "bytes": round(mean)} for name, mean in sizes.items()},
                "copy": {name: self._copy(name, engine, hashed=True) for name in JPEGS},
                "copy unhashed": {name: self._copy(name, engine, hashed=False) for name in JPEGS},
                "reencode": {resize: self._reencode(resize) for resize in (SHORT, SQUASH)},
                "workers": {resize: self._workers(resize, engine, two) for resize in (COPY, SHORT)},
                "in order": self._in_order(engine),
                "gzip_bytes": self._gzip(),
            }
        return {**summary, "hours": hours(summary)}

    def _copy(self, size: str, engine: Engine, hashed: bool) -> dict[str, dict[str, float]]:
        runs = {"ours": self._ours(size, COPY, engine, hashed=hashed)}
        for peer, buffering in BUFFERS.items():
            runs[peer] = partial(write_theirs, self.directory / size, buffering=buffering, hashed=hashed)
        measured = self._alternate(f"copy {size}{'' if hashed else ', unhashed'}", runs)
        return {peer: measured.compare("ours", peer) for peer in BUFFERS}

    def _reencode(self, resize: str) -> dict[str, float]:
        """Each in a process of its own, as they are used: what one allocates and frees changes the other's speed."""
        images = sorted((self.directory / LARGE).rglob("*.JPEG"))[:NUM_IN_MEMORY]
        seconds: dict[str, list[tuple[float, float]]] = {"ours": [], "Pillow": []}
        with open_engine("local", 2) as ours, open_engine("local", 2) as theirs:
            turns = [("ours", ours, prepare), ("Pillow", theirs, resize_with_pillow)]
            for repetition in range(self.repetitions + 1):
                for name, engine, function in turns[:: 1 if repetition % 2 else -1]:
                    task = (function, images, ImageOptions(resize))
                    seconds[name] += [*engine.run(_reencode_all, [task], lambda *done: None)] * bool(repetition)
        return Measured(f"{resize}, in memory", len(images), seconds).compare("ours", "Pillow")

    def _workers(self, resize: str, one: Engine, two: Engine) -> dict[str, float]:
        """Wall time, and the images a second of CPU time that one worker writes."""
        runs = {"two workers": self._ours(LARGE, resize, two), "one worker": self._ours(LARGE, resize, one)}
        measured = self._alternate(f"{resize}, wall time", runs)
        compared = measured.compare("two workers", "one worker", WALL)
        return {**compared, "cpu": round(measured.rate("one worker"), 1)}

    def _in_order(self, engine: Engine) -> dict[str, float]:
        """Images a second of CPU time through spools, the way of archives compressed with gzip."""
        runs = {name: self._ours(size, name, engine, in_order=True) for size, name in ((LARGE, SQUASH), (SMALL, COPY))}
        measured = self._alternate("in order", runs)
        return {name: round(measured.rate(name), 1) for name in runs}

    def _gzip(self) -> int:
        """Bytes of an archive of JPEGs a second of CPU time. (Those of a higher quality gzip can only store.)"""
        folder = self.directory / "gzip"
        make_images(folder, (500, 375), 90, 50)
        archive = gzip.compress(b"".join(path.read_bytes() for path in folder.rglob("*.JPEG")), compresslevel=6)
        runs: dict[str, Run] = {"gzip": lambda out: gzip.GzipFile(fileobj=io.BytesIO(archive)).read()}
        return round(self._alternate("gzip", runs, len(archive)).rate("gzip"))

    def _ours(self, size: str, resize: str, engine: Engine, in_order: bool = False, hashed: bool = True) -> Run:
        options = WriteOptions(shard_size=str(SHARD_SIZE), in_order=in_order, images=ImageOptions(resize))
        return partial(write_ours, self.directory / size, options=options, engine=engine, hashed=hashed)

    def _alternate(self, what: str, runs: Mapping[str, Run], amount: int = 0) -> Measured:
        """The runs in turn, there and back; the first time, when they import and start things, does not count."""
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for repetition in tqdm(range(self.repetitions + 1), what, leave=False, disable=None):
            for name, run in list(runs.items())[:: 1 if repetition % 2 else -1]:
                with tempfile.TemporaryDirectory(dir=self.directory) as out:
                    cpu, wall = time.process_time(), time.perf_counter()
                    run(Path(out) / "out")
                    if repetition:
                        seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
        return Measured(what, amount or self.num_images, seconds)


def hours(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What the rates imply of one core and of NUM_CORES, disks left aside. One process reads an archive, for its names
    and again while the others encode."""
    alone, in_order, found = summary["workers"], summary["in order"], {}
    for what, num_images, rate, num_bytes in (
        ("1k, copied", IMAGES_1K, alone[COPY]["cpu"], 0.0),
        (f"1k, {SHORT}", IMAGES_1K, alone[SHORT]["cpu"], 0.0),
        (f"21k-P of winter21, {SQUASH}", IMAGES_21K_P, in_order[SQUASH], WINTER21_BYTES),
        ("21k-P of resized21k, copied", IMAGES_21K_P, in_order[COPY], RESIZED_21K_BYTES),
    ):
        encoding, reading = num_images / rate / 3600, num_bytes / summary["gzip_bytes"] / 3600
        on_many = reading + max(reading, encoding / (NUM_CORES - bool(num_bytes)))
        found[what] = {"1 core": round(encoding + 2 * reading, 3), f"{NUM_CORES} cores": round(on_many, 3)}
        print(f"{what:<32}{', '.join(f'{hours:.2f} hours of {cores}' for cores, hours in found[what].items())}")
    return found


if __name__ == "__main__":
    sys.exit(main())
