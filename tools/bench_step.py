"""What the trainer costs: a training step of ours beside one of a bare PyTorch loop, and how quick it is.

Our side is the trainer's own loop on a run that `prepare` made: learning rate, step, skips, average, record, stop flag.
It is fed one batch again and again, and in between a loop of a dozen lines trains the same model on the same batch, in
the same process, precision and compilation, with AdamW and clipping; once without and once with an average of the
weights. So both sides take turns; the first turn does not count. Ratios are ours over theirs, of medians; `quartiles`
are those of single turns. Peaks of memory are measured with each side in a process of its own: on CUDA what is
allocated, on the CPU how much the resident size grows. MFU is 3 times the forward pass's FLOPs over the step and
--peak-tflops.

With --keep-rates ours trains on such shares of the tokens by token expansion, theirs on all: a stage of ToE a row, each
without an average, and "faster" is how much that makes stages of one length together. DeiT-S in its stages:
--models deit_small_patch16_224 --keep-rates 0.5 0.75 1

Prints a table, and appends a JSON line. On a GPU, beside timm's ViT of the same size:
--device cuda --models vittm_base vit_base_patch16_224 --precision bf16 --compile inductor --batch 256 --steps 10
--peak-tflops 989
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pipeline.backend.ddp
import pipeline.models  # noqa: F401 - registers our models with timm
from pipeline.backend import World, start
from pipeline.telemetry.flops import FORWARDS_A_STEP, forward_flops
from shards.engine import open_engine
from shards.sources.folders import ClassFolders
from shards.writing.options import WriteOptions
from shards.writing.writer import write
from tools.benchmarks import NUM_CLASSES, ROOT, append, header, make_images
from tools.step_sides import Bare, Settings, Turns, make_batch, peak, reset_peak, train_fed

PACKAGES = ("torch", "timm", "accelerate")
MODELS = ("vittm_small", "vit_small_patch16_224")
KINDS: dict[str, dict[str, Any]] = {"plain": {"averaged": False}, "ema": {"averaged": True}}
PEAK_STEPS = 2
# Blocks above it go back to the system when they are freed, so that the resident size is what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_ARENA_MAX": "1"}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _options(arguments)
    world = start(options.device)
    torch.set_num_threads(options.threads)
    record = header("step", "tools/bench_step.py", arguments, PACKAGES)
    record["device"] = torch.cuda.get_device_name() if world.device.type == "cuda" else f"{options.threads} threads"
    record |= {"repetitions": options.turns, "steps_a_turn": options.steps, "batch": options.batch}
    print(f"{'a step':<34}{'ours':>10}{'bare':>10}{'ratio':>8}{'quartiles':>16}{'img/s':>9}{'MFU':>8}{'memory':>8}")
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(world, options, Path(directory))
        bench.make_data()
        record["summary"] = {name: bench.measure(name) for name in options.models}
    append(record, options.output)
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        default=["vittm_small", "vit_small_patch16_224"],
        metavar="NAME",
        help="of timm's registry",
    )
    add("--image-size", type=int, default=224, metavar="PX", help="default: %(default)s")
    add("--batch", type=int, default=16, metavar="B", help="default: %(default)s")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    add("--compile", choices=("off", "aot_eager", "inductor"), default="off", help="of each layer, on both sides")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="of the CPU (default: all)")
    add("--turns", type=int, default=9, metavar="R", help="of each side (default: %(default)s)")
    add(
        "--steps",
        type=int,
        default=1,
        metavar="N",
        help="of a turn (default: 1; on a GPU take 10)",
    )
    add("--keep-rates", nargs="+", type=float, default=[], metavar="R", help="of tokens, above 0.25, to 1")
    add("--peak-tflops", type=float, metavar="T", help="of the device: gives MFU (an H100's bf16: 989)")
    add("--output", type=Path, default=ROOT / "benchmarks/step.jsonl", metavar="FILE")
    options = parser.parse_args(arguments)
    numbers = [options.batch, options.threads, options.turns, options.steps]
    if min(numbers) < 1:
        parser.error(f"batch, threads, turns and steps are {numbers}: each must be at least 1")
    if not all(0.25 < rate <= 1 for rate in options.keep_rates):
        parser.error(
            f"--keep-rates {options.keep_rates}: each must be above 0.25, which is what it begins with, and at most 1"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no CUDA device here: leave --device out")
    return options


@dataclass(frozen=True)
class Bench:
    world: World
    options: argparse.Namespace
    root: Path

    def make_data(self) -> None:
        """Shards that a run can be prepared on: a global batch of training images, and one a class to evaluate."""
        for split, number in (("train", max(self.options.batch, NUM_CLASSES)), ("val", NUM_CLASSES)):
            make_images(self.root / split, (32, 32), 90, number, num_different=NUM_CLASSES)
            with open_engine("local", 1) as engine:
                write(ClassFolders(str(self.root / split), split), self.root / "data", WriteOptions(), engine)

    def measure(self, name: str) -> dict[str, Any]:
        """A model's figures, without and with an average."""
        given = self.options
        plain = Settings(
            name, given.image_size, given.batch, given.precision, given.compile, given.device, averaged=False
        )
        kinds = {f"keep {rate:g}": {"keep_rate": rate} for rate in given.keep_rates} or KINDS
        found: dict[str, Any] = {
            kind: self._compare(replace(plain, **changed), kind) for kind, changed in kinds.items()
        }
        if given.keep_rates:
            found["faster"] = _faster([found[kind]["ratio"] for kind in kinds])
            print(f"{name}: stages of one length together take 1/{found['faster']} of the time on all tokens")
        return {"forward_gflops": round(self._gflops(plain), 3), **found}

    def _gflops(self, settings: Settings) -> float:
        recipe = settings.recipe(self.root / "data", self.root, 1)
        return forward_flops(recipe, NUM_CLASSES, settings.batch, epoch=0) / 1e9

    def _compare(self, settings: Settings, kind: str) -> dict[str, Any]:
        turns = Turns(make_batch(settings, self.world.device), self.options.turns, self.options.steps)
        run_dir = self.root / f"{settings.model}-{kind.replace(' ', '-')}"
        recipe = settings.recipe(self.root / "data", run_dir, turns.total)
        bare = Bare(recipe, self.world.device)
        train_fed(recipe, self.world, partial(turns.feed, bare.step))
        del bare
        peaks = {side: self._peak_alone(side, settings) for side in ("ours", "bare")}
        found = _figures(turns, peaks, self._gflops(settings), self.options)
        _report(f"{settings.model}, {kind}", found)
        return found

    def _peak_alone(self, side: str, settings: Settings) -> int:
        os.environ.update(MALLOC)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(peak_of, side, settings, self.root, self.options.threads).result()


def peak_of(side: str, settings: Settings, root: Path, threads: int) -> int:
    """Bytes above those of a process that has imported everything; to be called in one that does nothing else."""
    world = start(settings.device)
    torch.set_num_threads(threads)
    before = reset_peak(world.device)
    batch, found = make_batch(settings, world.device), [0]
    run_dir = root / f"{settings.model}-{settings.averaged}-{settings.keep_rate}-peak"
    recipe = settings.recipe(root / "data", run_dir, PEAK_STEPS + 1)

    def feed():
        for _ in range(PEAK_STEPS):
            yield batch
        found[0] = peak(world.device)
        yield batch

    if side == "ours":
        train_fed(recipe, world, feed)
    else:
        bare = Bare(recipe, world.device)
        for one in feed():
            bare.step(one)
    return found[0] - before


def _figures(turns: Turns, peaks: dict[str, int], gflops: float, options: argparse.Namespace) -> dict[str, Any]:
    ours, theirs = statistics.median(turns.ours), statistics.median(turns.theirs)
    single = [mine / other for mine, other in zip(turns.ours, turns.theirs, strict=True)]
    low, _, high = statistics.quantiles(single, n=4, method="inclusive") if len(single) > 1 else single * 3
    speed = options.batch / ours
    found = {
        "ms": {"ours": round(ours * 1000, 2), "bare": round(theirs * 1000, 2)},
        "ratio": round(ours / theirs, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "images_per_second": round(speed, 2),
        "peak_bytes": peaks,
        "memory_ratio": round(peaks["ours"] / peaks["bare"], 4),
    }
    if options.peak_tflops:
        found["mfu"] = round(FORWARDS_A_STEP * gflops * speed / (options.peak_tflops * 1000), 4)
    return found


def _faster(ratios: Sequence[float]) -> float:
    return round(1 / statistics.fmean(ratios), 4)


def _report(title: str, found: dict[str, Any]) -> None:
    low, high = found["quartiles"]
    mfu = f"{found['mfu']:.1%}" if "mfu" in found else "-"
    columns = f"{found['ms']['ours']:>10.1f}{found['ms']['bare']:>10.1f}{found['ratio']:>8.3f}{low:>8.3f}{high:>8.3f}"
    print(f"{title:<34}{columns}{found['images_per_second']:>9.1f}{mfu:>8}{found['memory_ratio']:>8.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
