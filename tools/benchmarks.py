"""What benchmarks share: synthetic images, and the JSON lines under benchmarks/."""

import datetime
import json
import os
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
LARGE, SMALL = "500x375", "224x224"
JPEGS = {LARGE: ((500, 375), 95), SMALL: ((224, 224), 98)}  # size, and the quality that gives the bytes of photographs
NUM_CLASSES = 10


def header(benchmark: str, script: str, arguments: Sequence[str], packages: Sequence[str]) -> dict[str, Any]:
    """A record that is about to be measured: what, when, of which commit, where, and by which command."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return {
        "benchmark": benchmark,
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip(),
        "hardware": "; ".join(filter(None, (_hardware(), ", ".join(f"{name} {version(name)}" for name in packages)))),
        "command": shlex.join(["python", script, *arguments]),
        "load": [round(os.getloadavg()[0], 2)],
    }


def append(record: dict[str, Any], output: Path) -> None:
    """The record as a line of `output`, with the load after the one before; a benchmark makes for a part of it."""
    record["load"].append(round(os.getloadavg()[0], 2))
    with open(output, "a") as file:
        file.write(json.dumps(record) + "\n")


def alternate(runs: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of wall time of each run, which take turns, there and back; the first turn, a warm-up, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in list(runs.items())[:: 1 if repetition % 2 else -1]:
            began = time.perf_counter()
            run()
            if repetition:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _hardware() -> str:
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores of {cpu.partition(': ')[2]}, {gigabytes:.0f} GiB"


def make_images(
    folder: Path, size: tuple[int, int], quality: int, number: int, num_different: int = 500, optimize: bool = False
) -> float:
    """Writes class folders of JPEGs of smooth noise and of more or less grain; their mean bytes.

    The first `num_different` are files, more than a CPU's caches hold, and the others links to them. `optimize`: with
    Huffman tables of their own, as those have that get restart markers.
    """
    generator, paths = np.random.default_rng(0), list[Path]()
    for i in range(number):
        class_name = f"n{i % NUM_CLASSES:08d}"
        paths.append(folder / class_name / f"{class_name}_{i}.JPEG")
        paths[i].parent.mkdir(parents=True, exist_ok=True)
        if i < num_different:
            _noise(generator, size).save(paths[i], quality=quality, optimize=optimize)
        else:
            paths[i].hardlink_to(paths[i % num_different])
    return statistics.mean(path.stat().st_size for path in paths)


def _noise(generator: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    pixels = generator.normal(0, generator.uniform(4, 26), (size[1], size[0], 1))
    for cell, levels in ((128, 60), (32, 25), (8, 10)):
        coarse = generator.normal(128, levels, (size[1] // cell + 2, size[0] // cell + 2, 3))
        smooth = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        pixels = pixels + np.asarray(smooth) - 128.0
    return Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))
