"""How far the fast path (`--augment.decode fast`) is from the exact one, in levels of 255 and in top-1.

Levels: both paths transform the same JPEGs with the same draws: two photographs that scikit-learn ships, cut into
pieces of 500x375 pixels, and of 224x224. Without RandAugment, and with RandAugment(2, 15); crops by bicubic, and
with timm's rand-m9-mstd0.5-inc1.

Top-1: the demo's model is trained from scratch on the demo's digits by either path, from the same seeds, in turns; both
are evaluated on the exact path. Then each model that was trained on the exact path labels random crops of the
held-out digits as either path makes them.

Prints a table, and appends a JSON line. Needs `python tools/demo.py --data-only`.
"""

import argparse
import io
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from tqdm import tqdm

from pipeline.augment.device import normalise
from pipeline.augment.exact import TrainTransform
from pipeline.augment.fast import FastTrainTransform
from pipeline.augment.policies import TimmPolicy, TorchvisionPolicy
from pipeline.data.samples import Transform
from pipeline.predict import load_run
from pipeline.record import last_evaluation
from shards.crop import has_crop_decode
from shards.index import Index
from shards.keyed import uniforms
from shards.reader import Reader
from tools.benchmarks import ROOT, append, header

PATHS: dict[str, type[TrainTransform] | type[FastTrainTransform]] = {
    "exact": TrainTransform,
    "fast": FastTrainTransform,
}
SETTINGS_OF: dict[str, dict[str, Any]] = {
    "crop": {},
    "randaugment": {"randaugment": TorchvisionPolicy(2, 15)},
    "bicubic crop": {"interpolation": "bicubic"},
    "timm-increasing": {"interpolation": "bicubic", "randaugment": TimmPolicy(2, 9, 0.5, "bicubic")},
}
SIZES = ((500, 375), (224, 224))
RECIPE_FILE = "recipes/finetune_1k.py"  # its debug form, with the settings that recipes/demo.py fine-tunes with
SETTINGS = shlex.split(
    """--debug --loss ce --ema-decay 0.95 --data.global-batch 64 --data.workers 1
    --augment.crop-scale 0.6 1.0 --augment.randaugment-ops 0 --augment.erasing 0 --augment.no-mixup --augment.no-cutmix
    --model.process-ps 16 --model.embed-dim 64 --model.depth 4 --model.num-heads 2 --model.drop-path-rate 0
    --optimizer.weight-decay 0.05 --schedule.lr 3e-3 --schedule.min-lr 1e-6 --evaluation.every 100%"""
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000, metavar="N", help="crops a size (default: 2000)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trained models a path (default: 3)")
    parser.add_argument("--length", default="30 epochs", help="of each training (default: 30 epochs)")
    parser.add_argument("--data", type=Path, default=Path("data/demo/digits"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/decode.jsonl", metavar="FILE")
    options = parser.parse_args(arguments)
    if not has_crop_decode():
        parser.error("shards/crop_decode.c was not built: install libjpeg-turbo's headers, and this package again")
    record = header("decode", "tools/bench_decode.py", arguments, ("pillow", "torchvision", "opencv-python-headless"))
    record["summary"] = {
        "levels": {f"{width}x{height}": levels((width, height), options.draws) for width, height in SIZES},
        "top1": top1(options.data, options.seeds, options.length),
    }
    report(record["summary"])
    append(record, options.output)
    return 0


def levels(size: tuple[int, int], num_draws: int) -> dict[str, dict[str, float]]:
    """Of crop and flip alone, and with RandAugment, torchvision's, and timm's on bicubic crops: the mean and largest
    difference, and the share of values off by more than one level."""
    images = list(photographs(size))
    found = {}
    for name, settings in SETTINGS_OF.items():
        exact, fast = (path(224, **settings) for path in PATHS.values())
        draws = uniforms(0, 0, np.arange(num_draws), 0, exact.num_draws)
        bins = np.zeros(256, np.int64)
        for number, row in enumerate(tqdm(draws, desc=f"{size[0]}x{size[1]}, {name}", leave=False)):
            data = images[number % len(images)]
            difference = np.abs(exact(data, row).astype(np.int16) - fast(data, row))
            bins += np.bincount(difference.ravel(), minlength=256)
        share = bins / bins.sum()
        found[name] = {
            "mean": round(float(share @ np.arange(256)), 4),
            "off_by_more_than_1": round(float(share[2:].sum()), 6),
            "largest": int(np.flatnonzero(bins)[-1]),
        }
    return found


def photographs(size: tuple[int, int]) -> Iterator[bytes]:
    """JPEGs of that size: pieces of scikit-learn's two photographs, at several scales."""
    for photo in load_sample_images().images:
        for scale in (1.0, 1.5, 2.0):
            image = Image.fromarray(photo).resize(
                [round(side * scale) for side in photo.shape[1::-1]], Image.Resampling.LANCZOS
            )
            for left in range(0, image.width - size[0] + 1, size[0]):
                buffer = io.BytesIO()
                image.crop((left, 0, left + size[0], size[1])).save(buffer, "JPEG", quality=92)
                yield buffer.getvalue()


def top1(data: Path, num_seeds: int, length: str) -> dict[str, Any]:
    """Of models trained by either path, and of crops that either path makes; a value a seed."""
    trained: dict[str, list[float]] = {path: [] for path in PATHS}
    crops: dict[str, list[float]] = {name: [] for name in (*PATHS, "agreement")}
    with tempfile.TemporaryDirectory() as directory:
        for seed in tqdm(range(num_seeds), desc="seeds"):
            for path in PATHS:
                run_dir = Path(directory) / f"{path}{seed}"
                train(data, run_dir, path, seed, length)
                trained[path].append(round(last_evaluation(run_dir)["ema_memory_top1"], 4))
            for name, value in on_crops(data, Path(directory) / f"exact{seed}", seed).items():
                crops[name].append(round(value, 4))
    return {"trained": trained, "crops": crops}


def train(data: Path, run_dir: Path, path: str, seed: int, length: str) -> None:
    command = [sys.executable, RECIPE_FILE, *SETTINGS, "--run-dir", run_dir, "--data.path", data, "--seed", seed]
    command += ["--augment.decode", path, "--schedule.length", length]
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@torch.no_grad()
def on_crops(data: Path, run_dir: Path, seed: int) -> dict[str, float]:
    """Top-1 of a trained model on random crops of the held-out images, by path; how often both get the same label."""
    trained, index = load_run(run_dir), Index.load(data)
    augment = trained.recipe.augment
    answers, labels = {}, None
    for name, path in PATHS.items():
        images, labels = crops_of(path(augment.image_size, augment.crop_scale, hflip=augment.hflip), index, seed)
        answers[name] = trained.model(normalise(images)).argmax(dim=1)
    shares = {name: (answer == labels).double().mean().item() for name, answer in answers.items()}
    return shares | {"agreement": (answers["exact"] == answers["fast"]).double().mean().item()}


def crops_of(transform: Transform, index: Index, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    reader = Reader(index, "val")
    draws = uniforms(seed, 0, np.arange(len(reader)), 0, transform.num_draws)
    read = [reader.read(sample, partial(_transformed, transform, row)) for sample, row in enumerate(draws)]
    images, labels = zip(*read, strict=True)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def _transformed(transform: Transform, draws: np.ndarray, data: bytes) -> np.ndarray:
    return transform(data, draws)


def report(summary: dict[str, Any]) -> None:
    print(f"{'levels of 255':<28}{'mean':>10}{'off by > 1':>12}{'largest':>9}")
    for size, found in summary["levels"].items():
        for name, values in found.items():
            row = f"{values['mean']:>10.4f}{values['off_by_more_than_1']:>12.4%}{values['largest']:>9}"
            print(f"{size + ', ' + name:<28}{row}")
    for kind, values in summary["top1"].items():
        for name, found in values.items():
            print(f"top-1, {kind}, {name}: mean {statistics.mean(found):.4f} of {found}")


if __name__ == "__main__":
    sys.exit(main())
