"""Ids to samples: right from any process, and a bad sample is named."""

import io
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.index import OFFSETS_DTYPE, Index
from shards.reader import BadSample, Reader


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def everything(reader):
    return [(reader.key(position), *reader.read(position, bytes)) for position in range(len(reader))]


def image_span(index, sample_id):
    """Shard path, byte offset in it and size of a sample's image."""
    row = index.offsets("train")[sample_id]
    ends = np.cumsum([shard.num_samples for shard in index.split("train").shards])
    name = index.split("train").shards[np.searchsorted(ends, sample_id, side="right")].name
    return index.root / name, int(row["offset"]), int(row["size"])


def test_samples_are_the_files_of_the_source(index, source):
    read = everything(Reader(index, "train"))
    files = {path.stem: path for path in source.glob("*/*")}
    assert {key for key, _, _ in read} == set(files)
    for key, data, label in read:
        assert data == files[key].read_bytes()
        assert index.classes[label] == files[key].parent.name


def test_decode_gets_the_bytes(index):
    image, label = Reader(index, "train").read(np.int64(4), pixels)
    assert image.shape[0] == 8
    assert label in range(3)


def test_a_reader_outside_its_split(index):
    with pytest.raises(IndexError, match="sample 21 of split 'train', which has 21"):
        Reader(index, "train").read(21, bytes)
    with pytest.raises(IndexError, match="sample -1"):
        Reader(index, "train").key(-1)


def test_a_pickled_reader_is_small_and_reads_the_same(index):
    reader = Reader(index, "train")
    before = everything(reader)
    assert everything(pickle.loads(pickle.dumps(reader))) == before


def test_readers_after_a_fork(index):
    reader = Reader(index, "train")
    expected = everything(reader)
    with multiprocessing.get_context("fork").Pool(2, initializer=use, initargs=(reader,)) as pool:
        children = pool.map(read_all, range(4))
    assert all(child == expected for child in children)
    assert everything(reader) == expected


def use(reader):
    global shared
    shared = reader


def read_all(_):
    return everything(shared)


def test_open_files_are_bounded(folders, written, tmp_path):
    index = written(folders(tmp_path / "many", classes=2, images=45), tmp_path / "out", shard_size=1)
    reader = Reader(index, "train")
    expected = everything(reader)
    assert open_shards(index) == 64
    assert everything(reader) == expected
    del reader
    assert open_shards(index) == 0


def open_shards(index):
    """How many shards of the index this process holds open."""
    links = [path.resolve() for path in Path("/proc/self/fd").iterdir()]
    return sum(link.parent == index.root and link.suffix == ".tar" for link in links)


def test_corrupted_image_bytes(index):
    key = Reader(index, "train").key(6)
    path, offset, size = image_span(index, 6)
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    with pytest.raises(BadSample) as error:
        Reader(Index.load(index.root), "train").read(6, pixels)
    text = str(error.value)
    assert f"bad sample in {path}: key {key!r}, sample 6 of split 'train': UnidentifiedImageError" in text
    assert "rewrite the split with tools/make_shards.py" in text


def test_a_tar_truncated_under_the_reader(index):
    reader = Reader(index, "train")
    path, offset, size = image_span(index, 6)
    os.truncate(path, offset + size - 1)
    with pytest.raises(BadSample, match=f"ends after {size + 511} of {size + 512} bytes at offset {offset - 512}"):
        reader.read(6, pixels)
    os.truncate(path, 0)
    with pytest.raises(BadSample, match="key unreadable, sample 6"):
        reader.read(6, pixels)
    assert reader.key(6) == ""


def test_a_shard_removed_under_the_reader(index):
    reader = Reader(index, "train")
    image_span(index, 6)[0].unlink()
    with pytest.raises(BadSample, match="sample 6 of split 'train': FileNotFoundError"):
        reader.read(6, pixels)


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_out_of_range(index, label):
    rows = np.array(index.offsets("train"))
    rows[6]["label"] = label
    np.save(index.root / "train.offsets.npy", rows)
    with pytest.raises(BadSample, match=rf"label {label} is not in \[0, 3\)"):
        Reader(Index.load(index.root), "train").read(6, pixels)


def test_offsets_that_are_nonsense(index):
    np.save(index.root / "train.offsets.npy", np.full(21, 2**64 - 1, dtype="<u8").astype(OFFSETS_DTYPE))
    with pytest.raises(BadSample, match="key unreadable, sample 6"):
        Reader(Index.load(index.root), "train").read(6, pixels)


def test_a_bad_sample_crosses_a_process_boundary():
    error = pickle.loads(pickle.dumps(BadSample("a.tar", "k", 7, "train", "why")))
    assert str(error) == str(BadSample("a.tar", "k", 7, "train", "why"))
    assert (error.shard, error.key, error.sample, error.split, error.reason) == ("a.tar", "k", 7, "train", "why")


def test_a_shard_replaced_by_another(index):
    """Of the same size, so that loading the index does not notice."""
    reader = Reader(index, "train")
    path, _, _ = image_span(index, 6)
    data = path.read_bytes()
    path.write_bytes(data[512:] + bytes(512))  # every member lies one block before its place
    with pytest.raises(BadSample, match="the shard is not the indexed one"):
        reader.read(6, bytes)
    assert reader.read(0, bytes)


def test_sizes_that_the_index_claims_are_bounded(index):
    rows = np.array(index.offsets("train"))
    rows[6]["size"] = 2**32 - 1
    np.save(index.root / "train.offsets.npy", rows)
    with pytest.raises(BadSample, match="the index gives it 4294967295 bytes, and 268435456 are the most"):
        Reader(Index.load(index.root), "train").read(6, bytes)
