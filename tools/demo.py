"""`make demo`: draws the data, writes the shards, launches recipes/demo.py, and sums up what came out.

Every step is a command that a user could type; it is printed before it runs. What is done already is skipped.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.record import last_evaluation, read_outcome

SPLITS = {"formula": ("train", "val"), "digits": ("train", "val", "few0", "few1", "few2")}
FEW = ("few0", "few1", "few2")
MAX_PROCESSES = 8


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="where images and shards go (default: data)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    parser.add_argument("--data-only", action="store_true", help="stop when the shards are written")
    parser.add_argument("--debug", action="store_true", help="ten steps a stage: a check that everything runs")
    options = parser.parse_args(argv)
    started = time.monotonic()
    try:
        make_data(options.data)
        if not options.data_only:
            train(options.data, options.run_dir, options.debug)
    except subprocess.CalledProcessError as error:
        print(f"error: the command above exited with code {error.returncode}; its message says why", file=sys.stderr)
        return 1
    if not options.data_only:
        report(options.run_dir, summary(options.run_dir, time.monotonic() - started))
    return 0


def make_data(data: Path) -> None:
    """Images as class folders, then shards with an index."""
    _run([sys.executable, "tools/make_demo_data.py", f"{data}/demo-src"])
    for dataset, splits in SPLITS.items():
        for split in splits:
            source, out = f"{data}/demo-src/{dataset}/{split}", f"{data}/demo/{dataset}"
            _run([sys.executable, "tools/make_shards.py", "folder", source, out, "--split", split])


def train(data: Path, run_dir: Path, debug: bool) -> None:
    """The recipe on two CPU processes, or one a GPU (a power of two: its batches must divide)."""
    processes = num_processes()
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", "ds_configs/ddp_cpu2.yaml"] if processes > 1 else []
    launch += ["--num_processes", str(processes), "recipes/demo.py", "--run-dir", str(run_dir)]
    launch += ["--pretrain.runtime.processes", str(processes), *(["--debug"] if debug else [])]
    for stage, dataset in (("pretrain", "formula"), ("finetune", "digits"), ("few", "digits")):
        launch += [f"--{stage}.data.path", f"{data}/demo/{dataset}"]
    _run(launch)


def num_processes() -> int:
    gpus = torch.cuda.device_count()
    return 2 if gpus == 0 else min(MAX_PROCESSES, 1 << (gpus.bit_length() - 1))


def summary(run_dir: Path, seconds: float) -> dict:
    """Top-1 and top-5 of the averaged weights' memory head on the held-out digits, and what it took."""
    pretrain = read_outcome(run_dir / "pretrain")
    few = {name: [_scores(run_dir / f"{split}_{name}")["top1"] for split in FEW] for name in ("chain", "scratch")}
    return {
        "chain": _scores(run_dir / "chain"),
        "scratch": _scores(run_dir / "scratch"),
        "few": few,
        "pretrain": {"images": pretrain["images"], "seconds": round(pretrain["seconds"], 1)},
        "seconds": round(seconds, 1),
    }


def report(run_dir: Path, found: dict) -> None:
    """Writes summary.json and prints the table. Where every stage was skipped, the time of the first run stays."""
    path = run_dir / "summary.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    if before | {"seconds": found["seconds"]} == found:
        found = before
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{'held-out digits, top-1':<32}{'pretrained':>12}{'from scratch':>14}")
    print(f"{'all 1,198 labels':<32}{found['chain']['top1']:>12.4f}{found['scratch']['top1']:>14.4f}")
    for name, measure in (("mean", statistics.mean), ("standard deviation", statistics.stdev)):
        chain, scratch = (measure(found["few"][start]) for start in ("chain", "scratch"))
        print(f"{f'100 labels, 3 seeds: {name}':<32}{chain:>12.4f}{scratch:>14.4f}")
    images, seconds = found["pretrain"]["images"], found["pretrain"]["seconds"]
    print(f"pretraining: {images:,} images in {seconds:.0f} s; everything: {found['seconds']:.0f} s; {path}")


def _scores(run_dir: Path) -> dict[str, float]:
    evaluated = last_evaluation(run_dir)
    return {name: round(evaluated[f"ema_memory_{name}"], 4) for name in ("top1", "top5")}


def _run(command: list[str]) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
