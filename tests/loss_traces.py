"""The debug forms of recipes, trained for 50 steps on images that are the same everywhere, and what they came to.

    python tests/loss_traces.py          compares with tests/golden/traces, and prints by how much each trace is off
    python tests/loss_traces.py --write  writes these files anew: where a change was meant to alter numerics

Pixels are drawn as integers, so that no machine's sine or exponential is in them, and encoded by the pinned Pillow;
a trace has the fingerprints of its data. `environment` is what the last bits of a sum depend on.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline import chain
from pipeline.backend import World, start
from pipeline.recipe import parse
from pipeline.record import read_metrics
from recipes import chain as chain_recipe
from recipes import demo, finetune_1k, pretrain_21k
from shards.engine import open_engine
from shards.index import Index
from shards.sources.folders import ClassFolders
from shards.writing.options import WriteOptions
from shards.writing.writer import write

GOLDEN = Path(__file__).parent / "golden" / "traces"
STEPS, NUM_CLASSES = 50, 5
SMALLER = {
    "data.global-batch": 16,
    "data.workers": 0,
    "augment.image-size": 16,
    "model.embed-dim": 24,
    "schedule.length": f"{STEPS} steps",
    "evaluation.every": "100%",
    "evaluation.batch": 8,
    "checkpoint.every": "100%",
    "runtime.log-every": "1 steps",
}
SHAMPOO = "--optimizer.name shampoo --optimizer.shampoo.start-preconditioning-step 20"
SHAMPOO += " --optimizer.shampoo.precondition-frequency 10 --optimizer.shampoo.max-preconditioner-dim 64"


def record(root: Path) -> None:
    """ROOT/traces/NAME.json of every trace, by one process; it needs to leave by `trainer.leave` afterwards."""
    torch.set_num_threads(1)
    data, world = make_data(root), start("cpu")
    found = run_stages(root, data, world)
    options = options_of(data)
    for name, module, more in (("finetune_1k", finetune_1k, []), ("shampoo", pretrain_21k, SHAMPOO.split())):
        recipe = parse(module.make, module.MODELS, "", ["--debug", *options, *more, "--run-dir", name])
        found |= fit([chain.Train(name, recipe)], root, world)
    (root / "traces").mkdir()
    for name, run_dir in found.items():
        (root / "traces" / f"{name}.json").write_text(json.dumps(trace(run_dir, data), indent=1) + "\n")


def run_stages(root: Path, data: Path, world: World) -> dict[str, Path]:
    """Of the recipes that are chains: pretraining, and the fine-tuning that starts from it."""
    found = {}
    for name, module, models in (("chain", chain_recipe, pretrain_21k.MODELS), ("demo", demo, (demo.MODEL,))):
        options = [text for stage in ("pretrain", "finetune") for text in options_of(data, f"{stage}.")]
        recipe = parse(module.make, models, "", ["--debug", *options])
        runs = fit(module.stages(recipe)[:2], root / name, world)
        found |= {f"{name}-{stage}": run_dir for stage, run_dir in runs.items()}
    return found


def fit(stages: Sequence[chain.Stage], root: Path, world: World) -> dict[str, Path]:
    assert chain.do_all(stages, root, chain.Options(), world) == "done"
    return {stage.name: root / stage.directory for stage in stages}


def options_of(data: Path, prefix: str = "") -> list[str]:
    given = SMALLER | {"data.path": data}
    return [text for name, value in given.items() for text in (f"--{prefix}{name}", str(value))]


def trace(run_dir: Path, data: Path) -> dict:
    lines, index = read_metrics(run_dir), Index.load(data)
    steps, (evaluation,) = [line for line in lines if "split" not in line], [line for line in lines if "split" in line]
    return {
        "environment": environment(),
        "data": {split: index.fingerprint(split) for split in ("train", "val")},
        "loss": [line["loss"] for line in steps],
        "grad_norm": [line["grad_norm"] for line in steps],
        "evaluation": {name: value for name, value in evaluation.items() if name.endswith("_loss")},
    }


def environment() -> dict[str, object]:
    """Where it is the same, sums are bit by bit; MKL and oneDNN go by the processor, beyond torch's capability."""
    cpu = Path("/proc/cpuinfo").read_text()
    named = [next(line for line in cpu.splitlines() if line.startswith(key)) for key in ("vendor_id", "cpu family")]
    model = next(line for line in cpu.splitlines() if line.startswith("model\t"))
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "processor": " ".join(line.partition(": ")[2] for line in (*named, model)),
        "threads": torch.get_num_threads(),
    }


def difference(found: dict, expected: dict) -> float:
    """The largest relative difference of a loss or a norm, or of a loss in the evaluation. (Other processors seem to
    resize to other pixels, by a rounding: without AVX2 the norm of finetune_1k's first gradient moves by 1e-4.)"""
    pairs = [pair for name in ("loss", "grad_norm") for pair in zip(found[name], expected[name], strict=True)]
    assert found["evaluation"].keys() == expected["evaluation"].keys()
    pairs += [(found["evaluation"][name], value) for name, value in expected["evaluation"].items()]
    return max(abs(value / reference - 1) for value, reference in pairs)


def make_data(root: Path) -> Path:
    """Shards of 16 px: 80 images of split train, 23 of split val; a class has a colour and a period of its own."""
    generator = np.random.default_rng(0)
    for split, per_class in (("train", [16] * NUM_CLASSES), ("val", [5, 5, 5, 4, 4])):
        for label, count in enumerate(per_class):
            (root / split / f"c{label}").mkdir(parents=True)
            for number in range(count):
                picture(generator, label).save(root / split / f"c{label}" / f"{label}_{number}.jpg", quality=90)
        with open_engine("local", 1) as engine:
            write(ClassFolders(root / split, split), root / "shards", WriteOptions(shard_size="30"), engine)
    return root / "shards"


def picture(generator: np.random.Generator, label: int) -> Image.Image:
    """Stripes, in noise."""
    columns = (np.arange(16) + generator.integers(16)) * (label + 2) % 16 * 12
    noise = generator.integers(-20, 21, (16, 16, 3))
    tint = np.array([label * 20, 40, 80 - label * 20])
    return Image.fromarray((columns[None, :, None] + tint + noise).clip(0, 255).astype(np.uint8))


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        record(root)
        for path in sorted((root / "traces").iterdir()):
            golden = GOLDEN / path.name
            if golden.exists():
                off = difference(json.loads(path.read_text()), json.loads(golden.read_text()))
                print(f"{path.name}: off by {off:.1e} of what was written before")
        if "--write" in sys.argv:
            shutil.copytree(root / "traces", GOLDEN, dirs_exist_ok=True)
    sys.stdout.flush()
    os._exit(0)  # as trainer.leave does, for gloo's sake


if __name__ == "__main__":
    main()
