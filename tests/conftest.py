"""Real shards, and real rank processes that train on them."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ["OMP_NUM_THREADS"] = "1"  # of all processes that the tests start: two ranks share two cores
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(__file__).parents[1] / ".venv" / "torch_extensions"))

import ranks
import torch

from pipeline.backend.world import World
from shards.engine import open_engine
from shards.sources.folders import ClassFolders
from shards.writing.options import WriteOptions
from shards.writing.writer import write

NUM_CLASSES = 5


@pytest.fixture(scope="session", autouse=True)
def _processes() -> None:
    """Forking from a process with running torch threads hangs, so ranks are forked from a server without any. Processes
    heed SIGINT also where a shell began the tests in the background, which ignore it then."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    multiprocessing.get_context("forkserver").set_forkserver_preload(ranks.PRELOADED)
    forkserver.ensure_running()  # now: the first to start it decides what it has imported, and shards start it too


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 5 classes of 16 px images: 80 of split train, 23 of split val (no multiple of any batch)."""
    root = tmp_path_factory.mktemp("data")
    for split, per_class in (("train", [16] * NUM_CLASSES), ("val", [5, 5, 5, 4, 4])):
        source = ClassFolders(_folders(root / split, per_class), split)
        with open_engine("local", 1) as engine:
            write(source, root / "shards", WriteOptions(shard_size="30"), engine)
    return root / "shards"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of scikit-learn's handwritten digits, as `make demo` has them."""
    root = tmp_path_factory.mktemp("demo")
    made = [sys.executable, "tools/demo.py", "--data-only", "--data", str(root)]
    subprocess.run(made, cwd=ranks.ROOT, check=True)
    return root / "demo/digits"


@pytest.fixture
def alone() -> World:
    """A world of one process, which talks to nobody."""
    return World("ddp", 0, 1, torch.device("cpu"))


@pytest.fixture
def do(alone, tmp_path, capsys):
    """do(stages, **options): what the chain in `tmp_path` says, but for the line about its page."""
    from pipeline import chain

    def run(stages, again="", only=()):
        outcome = chain.do_all(stages, tmp_path, chain.Options(again, only), alone)
        said = capsys.readouterr().out.replace(f"{tmp_path}/", "").splitlines()
        return [outcome, *(line for line in said if not line.startswith("the page about it"))]

    return run


@pytest.fixture
def small(shards: Path) -> list[str]:
    """Options that make a debug recipe tiny: it trains for 8 steps on `shards`."""
    options = {
        "data.path": shards,
        "data.global-batch": 16,
        "data.workers": 0,
        "augment.image-size": 16,
        "model.memory-ps": 4,
        "model.process-ps": 8,
        "model.embed-dim": 24,
        "schedule.length": "8 steps",
        "checkpoint.every": "2 steps",
        "evaluation.every": "50%",
        "evaluation.batch": 8,
    }
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


@pytest.fixture
def chain_options(small: list[str]) -> list[str]:
    """`small` for both stages of the debug chain, by the names that the fields have there."""
    return ["--debug", *(text.replace("--", f"--{stage}.") for stage in ("pretrain", "finetune") for text in small)]


@pytest.fixture(scope="session")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain that one process of DDP has finished, of 8 steps a stage; nobody may write there. `pretrain` evaluated
    every step, with so large a learning rate that the last is not the best; `finetune` uploaded its checkpoints, and is
    evaluated on the middle quarter of the images."""
    root = tmp_path_factory.mktemp("finished")
    both = {"data.path": shards, "data.global-batch": 16, "data.workers": 0, "augment.image-size": 16}
    both |= {"model.memory-ps": 4, "model.process-ps": 8, "model.embed-dim": 24, "evaluation.batch": 8}
    both |= {"schedule.length": "8 steps", "checkpoint.every": "4 steps"}
    options = {f"{stage}.{name}": value for stage in ("pretrain", "finetune") for name, value in both.items()}
    options |= {"pretrain.evaluation.every": "1 steps", "pretrain.schedule.lr": 0.004}
    options |= {"pretrain.augment.randaugment-ops": 0, "finetune.evaluation.crop-pct": 0.5}
    options |= {"finetune.checkpoint.upload": f"file://{root}/uploaded"}
    texts = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    arguments = ["--debug", *texts, "--pretrain.augment.no-mixup", "--run-dir", str(root / "chain")]
    ended = ranks.run_script("recipes/chain.py", arguments, root / "logs").wait()
    assert ended.codes == [0], ended.outputs
    return root / "chain"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ranks.Ranks]]:
    """start(script, options, size=1, **environment): ranks of a recipe file; none outlives the test."""
    started: list[ranks.Ranks] = []

    def run(script: str, options: list[str], size: int = 1, **environment: str) -> ranks.Ranks:
        started.append(ranks.run_script(script, options, tmp_path / "logs", size, **environment))
        return started[-1]

    yield run
    for running in started:
        running.kill()


def _folders(root: Path, per_class: list[int]) -> Path:
    """Class folders of images that a model can tell apart: stripes of a class's own period, in noise."""
    rng = np.random.default_rng(len(root.name))
    for label, count in enumerate(per_class):
        (root / f"c{label}").mkdir(parents=True)
        for number in range(count):
            stripes = 128 + 100 * np.sin(np.arange(16) * (label + 1) / 2 + rng.uniform(0, 6))
            pixels = (stripes[None, :, None] + rng.normal(0, 20, (16, 16, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"c{label}" / f"c{label}_{number}.jpg")
    return root
