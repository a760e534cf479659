"""`make soak`: the plan of ImageNet-21k-P for 1,024 ranks of 16 workers, memory over epochs, a moving world."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import ranks
from PIL import Image

from pipeline.backend.world import World
from pipeline.data.stream import TrainStream
from pipeline.prepare import make_input
from pipeline.recipe import Augment, Data, Recipe
from shards.engine import open_engine
from shards.index import Index
from shards.reader import Reader
from shards.sources.folders import ClassFolders
from shards.store import open_data
from shards.writing.options import WriteOptions
from shards.writing.writer import write

pytestmark = pytest.mark.soak
MIB = 1 << 20
SHUFFLES = ("global", "window")
IMAGES, BATCH = 2000, 64
EPOCHS = 10
MOST_GROWTH = 3 * MIB

PLAN = """
import json, re, sys, time
import numpy as np
from shards.audit import Seen, split_hash
from shards.layout import Layout
from shards.plan import GlobalShuffle, Plan, WindowShuffle, default_runs

SAMPLES, RANKS, WORKERS, A_RANK = 11_060_223, 1024, 16, 16
BATCH = RANKS * A_RANK

def make(shuffle):
    sizes = (5000,) * (SAMPLES // 5000) + (SAMPLES % 5000,)
    how = GlobalShuffle() if shuffle == "global" else WindowShuffle(sizes, default_runs(BATCH), 2048)
    return Plan(SAMPLES, "0123456789abcdef", 7, BATCH, how)

def seek(plan):
    return plan.ids(17, plan.batches_per_epoch // 2).tolist()[:4]

def audit(plan):
    '''Every share of a worker of a rank, as a loader deals them out: its batches in turn to its workers.'''
    given = np.empty((RANKS, plan.batches_per_epoch, A_RANK), dtype=np.int32)
    layout = Layout(BATCH, RANKS)
    for number in range(plan.batches_per_epoch):
        ids = plan.ids(3, number)
        for rank in range(RANKS):
            given[rank, number] = ids[layout.share(rank)]
    seen, counts = Seen(SAMPLES), np.zeros((RANKS, WORKERS), dtype=int)
    for rank in range(RANKS):
        for worker in range(WORKERS):
            share = given[rank, worker::WORKERS]
            counts[rank, worker] = len(share)
            seen.add(share.ravel())
    planned = seen.count
    seen.add(plan.tail(3))
    return {
        "planned": planned, "dropped": seen.count - planned, "duplicates": seen.num_duplicates,
        "missing": seen.num_missing, "outside": seen.num_outside, "exact_hash": seen.hash == split_hash(SAMPLES),
        "batches_a_rank": np.unique(counts.sum(axis=1)).tolist(), "batches_a_worker": np.unique(counts).tolist(),
    }

start = time.perf_counter()
result = {"seek": seek, "audit": audit}[sys.argv[1]](make(sys.argv[2]))
seconds = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
print(json.dumps({"seconds": seconds, "peak_mib": peak, "result": result}))
"""


def in_a_fresh_process(*arguments: str) -> dict:
    command = [sys.executable, "-c", PLAN, *arguments]
    return json.loads(subprocess.run(command, cwd=ranks.ROOT, check=True, capture_output=True).stdout)


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_eleven_million_samples_on_1024_ranks_of_16_workers(shuffle):
    done = in_a_fresh_process("audit", shuffle)
    took = f"{done['seconds']:.1f} s, {done['peak_mib']:.0f} MiB at most"
    print(f"\n{shuffle}: an epoch of 11,060,223 samples for 16,384 workers audited in {took}")
    assert done["result"] == {
        "planned": 675 * 16_384,
        "dropped": 11_060_223 - 675 * 16_384,
        "duplicates": 0,
        "missing": 0,
        "outside": 0,
        "exact_hash": True,
        "batches_a_rank": [675],
        "batches_a_worker": [42, 43],
    }


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_seeking_to_the_middle(shuffle):
    """With what it takes to build the plan, in a process that has drawn nothing yet."""
    done = in_a_fresh_process("seek", shuffle)
    print(f"\n{shuffle}: the middle of epoch 17 of 11,060,223 samples in {1000 * done['seconds']:.1f} ms")
    assert done["seconds"] < 1


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """2,000 images in 10 shards."""
    root = tmp_path_factory.mktemp("soak")
    noise = np.random.default_rng(0)
    for number in range(IMAGES):
        path = root / f"images/c{number % 5}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 40 + number % 30
        Image.fromarray(noise.integers(0, 256, (side, 50, 3), dtype=np.uint8)).save(path)
    with open_engine("local", 1) as engine:
        write(ClassFolders(root / "images", "train"), root / "shards", WriteOptions(shard_size="200"), engine)
        write(ClassFolders(root / "images", "val"), root / "shards", WriteOptions(shard_size="200"), engine)
    return root / "shards"


def stream_of(data: Path, shuffle: str, world: World, decode: str = "exact") -> TrainStream:
    augment = Augment(image_size=32, decode=decode, randaugment_ops=2, randaugment_magnitude=15)
    section = Data(path=str(data), global_batch=BATCH, workers=2, shuffle=shuffle, window=100)
    return make_input(Recipe(seed=7, data=section, augment=augment), *open_data(str(data)), world).stream


def memory() -> list[int]:
    """RSS of this process, and of all its children together."""
    this = psutil.Process()
    return [this.memory_info().rss, sum(child.memory_info().rss for child in this.children(recursive=True))]


@pytest.mark.parametrize("decode", ["exact", "fast"])
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_memory_stays_flat_over_epochs(data, alone: World, shuffle, decode):
    stream = stream_of(data, shuffle, alone, decode)
    steps = stream.plan.batches_per_epoch
    found = []
    with stream.open(0, EPOCHS * steps) as batches:
        for number, _ in enumerate(batches, 1):
            if number % steps == 0:
                found.append(memory())
    trainer, workers = np.transpose(found)
    print(f"\n{shuffle}, {decode}: MiB after each of {EPOCHS} epochs, process and workers")
    print("\n".join(" ".join(f"{size / MIB:.1f}" for size in sizes) for sizes in (trainer, workers)))
    for sizes in (trainer, workers):
        assert sizes[2:].max() - sizes[1] < MOST_GROWTH


def replayed(data: Path, shuffle: str, world: int, start: int) -> list[tuple[int, int, str]]:
    """What audit_stream prints of an epoch from a step on: (step, rank, key)."""
    command = [sys.executable, "tools/audit_stream.py", str(data), "--world", str(world), "--start-step", str(start)]
    command += ["--keys", "--global-batch", str(BATCH), "--seed", "7", "--epoch", "1", "--workers", "2"]
    command += ["--shuffle", shuffle, "--window", "100"]
    done = subprocess.run(command, cwd=ranks.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    lines = [line.split(" ") for line in done.stdout.splitlines() if line[0].isdigit()]
    return [(int(step), int(rank), key) for step, rank, key in lines]


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_a_world_of_4_then_3_then_2_then_8(data, alone: World, shuffle):
    steps = IMAGES // BATCH
    seed = random.SystemRandom().randrange(1 << 32)
    first, second, third = sorted(random.Random(seed).sample(range(1, steps), 3))
    parts = [(4, 0, first), (3, first, second), (2, second, third), (8, third, steps)]
    epoch = []
    for world, start, stop in parts:
        lines = [line for line in replayed(data, shuffle, world, start) if line[0] < stop]
        assert {rank for _, rank, _ in lines} == set(range(world))
        epoch += lines
    whole = replayed(data, shuffle, 1, 0)
    assert [(step, key) for step, _, key in epoch] == [(step, key) for step, _, key in whole]
    keys = [key for *_, key in epoch]
    reader, tail = Reader(Index.load(data), "train"), stream_of(data, shuffle, alone).plan.tail(1)
    assert len(set(keys)) == len(keys) == steps * BATCH
    assert {reader.key(sample) for sample in range(IMAGES)} - set(keys) == {reader.key(sample) for sample in tail}
    legs = ", ".join(f"to {stop} on {world} ranks" for world, _, stop in parts)
    print(f"\n{shuffle} (seed {seed}): steps {legs}: one exact epoch")
