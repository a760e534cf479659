"""Other readers get from our shards what our own gets: the same keys, labels and pixels."""

import gc
import hashlib
import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm.data
import webdataset
from foreign_tars import picture
from PIL import Image

from shards.index import Index
from shards.reader import Reader
from shards.writing.sidecars import write_sidecars

FIELDS = ("jpg", "png", "webp")
# webdataset, and timm through it, leave their tars open for the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*tar'>:ResourceWarning")


@pytest.fixture(autouse=True)
def _collected():
    """In the test that opened them, or the warning would come in another."""
    yield
    gc.collect()


def digest(image: Image.Image) -> str:
    """Of size and pixels."""
    pixels = np.asarray(image.convert("RGB"))
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def pixels(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        return digest(image)


def ours(index: Index) -> list[tuple[str, int, str]]:
    """Key, label and pixels of every sample, in order."""
    reader = Reader(index, "train")
    read = [(reader.key(position), *reader.read(position, pixels)) for position in range(len(reader))]
    return [(key, label, image) for key, image, label in read]


def shard_paths(index: Index) -> list[str]:
    return [str(index.root / shard.name) for shard in index.split("train").shards]


@pytest.fixture
def shards(index: Index) -> Index:
    """JPEG, PNG and WebP, with the sidecars."""
    write_sidecars(index)
    return index


@pytest.fixture
def jpegs(written, tmp_path: Path) -> Index:
    """JPEG alone."""
    for number in range(12):
        path = tmp_path / f"jpegs/c{number % 3}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return written(tmp_path / "jpegs", tmp_path / "shards")


def test_webdataset(shards):
    reader = webdataset.WebDataset(shard_paths(shards), shardshuffle=False, empty_check=False)
    images = [(item, next(item[name] for name in FIELDS if name in item)) for item in reader]
    assert [(item["__key__"], int(item["cls"]), pixels(image)) for item, image in images] == ours(shards)


def test_what_webdataset_decodes(shards):
    reader = webdataset.WebDataset(shard_paths(shards), shardshuffle=False).decode("pil")
    for (key, label, image), item in zip(ours(shards), reader, strict=True):
        assert (item["__key__"], item["cls"], item["json"]["wnid"]) == (key, label, shards.classes[label])
        assert digest(next(item[name] for name in FIELDS if name in item)) == image


def test_timm(shards):
    dataset = timm.data.create_dataset("wds/", root=str(shards.root), split="train", is_training=False)
    dataset.set_loader_cfg(num_workers=0)
    assert len(dataset) == 21
    read = [(label, digest(image)) for image, label in dataset]
    assert read == [(label, image) for _, label, image in ours(shards)]
    assert [name.removesuffix(".JPEG") for name in dataset.reader.filenames()] == [key for key, _, _ in ours(shards)]


def test_hugging_face_datasets(jpegs, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # else it counts its use over the network
    files = {"train": shard_paths(jpegs)}
    dataset = datasets.load_dataset(
        "webdataset", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path)
    )
    read = [(item["__key__"], item["cls"], digest(item["jpg"])) for item in dataset]
    assert read == ours(jpegs)
    assert {item["json"]["wnid"] for item in dataset} == set(jpegs.classes)
