"""Sidecars: what they say is what the tars hold, and Energon reads with them alone."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from foreign_tars import sample, write_tar
from PIL import Image

from shards.engine import open_engine
from shards.errors import UserError
from shards.index import Index
from shards.reader import Reader
from shards.tars.in_place import ForeignOptions, index_in_place
from shards.writing.sidecars import write_sidecars

NAMES = ["train-000000.tar", "train-000001.tar", "train-000002.tar", "train-000003.tar", "train-000004.tar"]
COUNTS = [5, 4, 4, 4, 4]


def load(index, name):
    return json.loads((index.root / name).read_bytes())


@pytest.fixture
def two_splits(index: Index, source: Path, written) -> Index:
    """Splits train and val."""
    written(source, index.root, "val", 21)
    index = Index.load(index.root)
    write_sidecars(index)
    return index


def test_timm(two_splits):
    splits = load(two_splits, "_info.json")["splits"]
    assert splits["train"] == {"name": "train", "num_samples": 21, "filenames": NAMES, "shard_lengths": COUNTS}
    assert splits["val"]["filenames"] == ["val-000000.tar"]


def test_open_clip(two_splits):
    assert load(two_splits, "sizes.json") == {**dict(zip(NAMES, COUNTS, strict=True)), "val-000000.tar": 21}


def test_energon(two_splits):
    assert load(two_splits, ".nv-meta/.info.json") == {"shard_counts": load(two_splits, "sizes.json")}
    assert load(two_splits, ".nv-meta/split.yaml") == {
        "split_parts": {"train": NAMES, "val": ["val-000000.tar"]},
        "exclude": [],
    }
    for name in load(two_splits, "sizes.json"):
        with tarfile.open(two_splits.root / name) as tar:
            members = tar.getmembers()
            starts = [member.offset for member in members if not member.name.endswith((".cls", ".json"))]
            assert np.fromfile(two_splits.root / f"{name}.idx", "<u8").tolist() == [*starts, tar.offset]


def test_sidecars_that_are_right_stay(two_splits, files_of):
    paths = [path for path in two_splits.root.rglob("*") if path.is_file()]
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in paths}
    write_sidecars(two_splits)
    assert {path: (path.read_bytes(), path.stat().st_ino) for path in paths} == before
    (two_splits.root / "train-000001.tar.idx").write_bytes(b"")
    (two_splits.root / "sizes.json").unlink()
    write_sidecars(two_splits)
    assert {path: path.read_bytes() for path in paths} == {path: data for path, (data, _) in before.items()}


def test_a_dataset_yaml_of_the_user_stays(two_splits):
    path = two_splits.root / ".nv-meta/dataset.yaml"
    path.write_text("mine")
    write_sidecars(two_splits)
    assert path.read_text() == "mine"


def test_tars_of_others_have_no_sidecars_of_energon(tmp_path):
    write_tar(tmp_path / "val-0.tar", sample("a", 0), sample("b", 0))
    with open_engine("local", 1) as engine:
        index = index_in_place(tmp_path, ForeignOptions(), engine, lambda images, num_bytes: None).index
    write_sidecars(index)
    assert load(index, "sizes.json") == {"val-0.tar": 2}
    assert not (tmp_path / ".nv-meta").exists()
    assert not (tmp_path / "val-0.tar.idx").exists()


def test_a_place_that_is_taken(index):
    (index.root / "sizes.json").unlink(missing_ok=True)
    (index.root / "sizes.json").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*sizes\.json: Is a directory"):
        write_sidecars(index)


# --- Energon itself, in an environment of its own

READ = """
import hashlib, json, sys
from megatron.energon import WorkerConfig, get_loader, get_val_dataset
from megatron.energon.task_encoder.base import DefaultTaskEncoder
for rank in range(2):
    config = WorkerConfig(rank=rank, world_size=2, num_workers=0)
    options = {"split_part": "train", "worker_config": config, "batch_size": None}
    dataset = get_val_dataset(sys.argv[1], task_encoder=DefaultTaskEncoder(), **options)
    for sample in get_loader(dataset):
        pixels = (sample.image * 255).round().byte().permute(1, 2, 0).numpy()
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        print(json.dumps([sample.__key__, sample.label, sample.label_name, digest]))
"""


def digest(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert("RGB"))
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def energon() -> str:
    """A Python that has Energon."""
    python = os.environ.get("ENERGON_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", "import megatron.energon"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip(
            f"{python} has no Energon: pip install megatron-energon==7.4.1 into an environment of its own, "
            "and set ENERGON_PYTHON to that environment's bin/python"
        )
    return python


def read_with_energon(python: str, directory: Path) -> list[list[object]]:
    process = subprocess.run([python, "-c", READ, str(directory)], capture_output=True, text=True, check=True)
    return sorted(json.loads(line) for line in process.stdout.splitlines())


@pytest.mark.soak
def test_energon_reads_our_shards(two_splits, energon):
    reader = Reader(two_splits, "train")
    expected = []
    for position in range(len(reader)):
        image, label = reader.read(position, digest)
        expected.append([reader.key(position), label, two_splits.classes[label], image])
    assert read_with_energon(energon, two_splits.root) == sorted(expected)


@pytest.mark.soak
def test_energon_prepares_our_shards(index, energon, tmp_path):
    write_sidecars(index)
    expected = read_with_energon(energon, index.root)
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in index.root.glob("*.tar"):
        shutil.copy(path, bare)
    options = {
        "--split-parts": "train:train-.*",
        "--sample-type": "ImageClassificationSample",
        "--field-map": '{"image": "jpg,png,webp", "label": "cls", "label_name": "json[wnid]"}',
        "--num-workers": "2",
    }
    arguments = [item for option in options.items() for item in option]
    command = [str(Path(energon).with_name("energon")), "prepare", str(bare), "--non-interactive", *arguments]
    subprocess.run(command, capture_output=True, check=True)
    assert read_with_energon(energon, bare) == expected
    for path in bare.glob("*.tar.idx"):
        assert path.read_bytes() == (index.root / path.name).read_bytes()
    assert (bare / ".nv-meta/index.sqlite").is_file()
