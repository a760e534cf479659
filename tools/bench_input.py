"""How many images our loader and others bring from disk to a batch, a second of CPU time and of wall time.

All read the same synthetic JPEGs, which lie in the page cache, by 2 worker processes, as uint8 batches of 64: crop and
flip at 224 px, and for some RandAugment(2, 15) after it. webdataset, timm and ImageFolder run beside ours; MosaicML
Streaming, LitData and SPDL in an environment of their own (benchmarks/peers/requirements.txt), which takes torch,
torchvision and Pillow from ours. Every run is a process of its own, timed from its 13th batch on, while all its workers
run, and ends before its data do. A round goes through all runs, and the next one back. CPU time is user and system
time of all processes of a run. decode-only: one process decodes the same files, in memory, and does no more.

DATA keeps images, shards and the environment for the next time: 14 GB for 20,000 images. Prints tables, and appends a
JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from tools.benchmarks import JPEGS, ROOT, append, header
from tools.input_data import LOADERS_FILE, Data, make_environment
from tools.input_figures import DECODE_ONLY, FAST, MARKERS, OURS, PLAIN, RANDAUGMENT, Rates, Run, report
from tools.input_plot import draw_rates

MIN_IMAGES = 256
START_UP = 6  # seconds of a run before it is timed, about
DECODED = {"500x375": 1000, "224x224": 3000}  # images a second of decode-only, about; for the estimate


class Loader(NamedTuple):
    """`data`: the form of the images that it reads. `speed`: about its images a second of wall time, over those of
    decode-only. `augments`: it is measured with RandAugment too. `apart`: it has not our environment."""

    function: str
    data: str
    speed: float
    augments: bool = False
    apart: bool = False
    package: str = ""


LOADERS = {
    DECODE_ONLY: Loader("loaders:decode_only", "images", 1.1, package="simplejpeg"),
    OURS: Loader("tools.input_ours:exact", "shards", 0.85, augments=True),
    FAST: Loader("tools.input_ours:fast", "shards", 1.45, augments=True, package="opencv-python-headless"),
    MARKERS: Loader("tools.input_ours:fast", "markers", 1.55, augments=True),
    "ImageFolder": Loader("loaders:image_folder", "images", 0.8, augments=True),
    "webdataset": Loader("loaders:webdataset", "shards", 0.75, package="webdataset"),
    "timm": Loader("loaders:timm", "shards", 0.7, package="timm"),
    "Streaming": Loader("loaders:streaming", "mds", 0.65, apart=True, package="mosaicml-streaming"),
    "LitData": Loader("loaders:litdata", "litdata", 0.6, apart=True, package="litdata"),
    "SPDL": Loader("loaders:spdl", "images", 0.75, apart=True, package="spdl"),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _options(arguments)
    record = header("input", "tools/bench_input.py", arguments, ())
    data = Data(options.data.absolute(), options.images, options.different)
    bench = Bench(data, options.environment or data.root / "environment", list(runs(options.sizes, options.loaders)))
    try:
        bench.prepare()
        rates = bench.measure(options.rounds)
    except subprocess.CalledProcessError as error:
        print(f"error: {error}\n{error.stderr or ''}", file=sys.stderr)
        return 1
    num_bytes = {size: data.mean_bytes(size) for size in options.sizes}
    record |= {"repetitions": options.rounds, "num_images": options.images, "bytes": num_bytes}
    record |= {"versions": bench.versions, "summary": report(rates, num_bytes, options.gpu_images_per_second)}
    append(record, options.output)
    if options.plot:
        draw_rates(record["summary"]["rates"], options.plot)
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, loaders = parser.add_argument, [name for name in LOADERS if name != DECODE_ONLY]
    add("data", type=Path, metavar="DATA", help="directory for what is read; kept, and used again")
    add("--images", type=int, default=20_000, metavar="N", help="that a run times (default: 20000)")
    add("--different", type=int, default=1000, metavar="N", help="images; all others repeat them (default: 1000)")
    add("--rounds", type=int, default=3, metavar="R", help="through all runs (default: 3)")
    add("--sizes", nargs="+", default=[*JPEGS], choices=JPEGS, help="of images (default: both)")
    add("--loaders", nargs="+", default=loaders, choices=loaders, help="beside decode-only (default: all)")
    add("--environment", type=Path, metavar="DIR", help="of the others; made if need be (default: DATA/environment)")
    add("--gpu-images-per-second", type=int, default=1000, metavar="N", help="to tell needs for (default: 1000)")
    add("--output", type=Path, default=ROOT / "benchmarks/input.jsonl", metavar="FILE")
    add("--plot", type=Path, metavar="FILE", help="PNG of the rates a second of CPU time")
    options = parser.parse_args(arguments)
    if options.images < MIN_IMAGES:
        parser.error(f"--images {options.images}: at least {MIN_IMAGES}, or a worker has no whole batch an epoch")
    if min(options.different, options.rounds, options.gpu_images_per_second) < 1:
        parser.error("different images, rounds and images a GPU: each must be at least 1")
    return options


def runs(sizes: Sequence[str], loaders: Sequence[str]) -> Iterator[Run]:
    """Those of a round."""
    for size in sizes:
        for name in (DECODE_ONLY, *loaders):
            yield Run(size, PLAIN, name)
            if LOADERS[name].augments:
                yield Run(size, RANDAUGMENT, name)


class Bench:
    """`versions`: of each run loader's packages, as the loader's process tells them."""

    def __init__(self, data: Data, environment: Path, runs: Sequence[Run]) -> None:
        self._data, self._environment, self._runs = data, environment, runs
        self.versions: dict[str, dict[str, str]] = {}

    def prepare(self) -> None:
        """Makes what is missing."""
        if any(LOADERS[run.loader].apart for run in self._runs):
            make_environment(self._environment)
        for run in self._runs:
            self._data.prepare(run.size, LOADERS[run.loader].data, self._environment)

    def measure(self, rounds: int) -> Rates:
        seconds = {run: self._expected(run) for run in self._runs}
        total = rounds * sum(seconds.values())
        print(f"{len(self._runs)} runs, {rounds} times: about {total / 60:.0f} minutes", flush=True)
        rates: Rates = {run: [] for run in self._runs}
        bar = "{desc:<42}{percentage:3.0f}%|{bar}| {elapsed} of the time, {remaining} left"
        with tqdm(total=total, bar_format=bar, disable=None) as progress:
            for number in range(rounds):
                for run in self._runs[:: -1 if number % 2 else 1]:
                    progress.set_description_str(", ".join(run))
                    rates[run].append(self._rate(run))
                    progress.update(seconds[run])
        return rates

    def _expected(self, run: Run) -> float:
        speed = LOADERS[run.loader].speed * DECODED[run.size] * (0.8 if run.augment == RANDAUGMENT else 1)
        return START_UP + self._data.num_timed / speed

    def _rate(self, run: Run) -> tuple[float, float]:
        loader = LOADERS[run.loader]
        python = self._environment / "bin/python" if loader.apart else sys.executable
        folder = self._data.folder(run.size, loader.data)
        command = [str(python), str(LOADERS_FILE), loader.function, str(folder), "--images", str(self._data.num_timed)]
        command += ["--randaugment"] * (run.augment == RANDAUGMENT)
        command += ["--package", loader.package] * bool(loader.package)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "" if loader.apart else str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        self.versions[run.loader] = found["versions"]
        return found["images"] / found["cpu"], found["images"] / found["wall"]


if __name__ == "__main__":
    sys.exit(main())
