"""The index refuses everything that is not whole, in words."""

import json
import pickle
import shutil

import numpy as np
import pytest

from shards.errors import UserError
from shards.index import OFFSETS_DTYPE, Index


def edit(index, change):
    path = index.root / "index.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_an_index_states_what_is_there(index):
    split = index.split("train")
    assert index.classes == ("c0", "c1", "c2")
    assert index.num_classes == 3
    assert split.num_samples == 21
    assert [shard.name for shard in split.shards] == [f"train-{number:06d}.tar" for number in range(5)]
    assert [shard.num_samples for shard in split.shards] == [5, 4, 4, 4, 4]
    assert split.num_bytes == sum(path.stat().st_size for path in index.root.glob("*.tar"))
    rows = index.offsets("train")
    assert isinstance(rows, np.memmap)
    assert rows.dtype == OFFSETS_DTYPE
    assert np.bincount(rows["label"]).tolist() == [7, 7, 7]


def test_an_index_is_a_value(index):
    assert Index.load(str(index.root)) == index
    assert pickle.loads(pickle.dumps(index)) == index


def test_fingerprint_tells_datasets_apart_and_not_places(index, source, written, tmp_path):
    moved = Index.load(shutil.copytree(index.root, tmp_path / "elsewhere"))
    assert moved.fingerprint("train") == index.fingerprint("train")
    assert len(index.fingerprint("train")) == 16
    reordered = written(source, tmp_path / "reordered", seed=1)
    (source / "c0").rename(source / "c9")
    renamed = written(source, tmp_path / "renamed")
    assert len({one.fingerprint("train") for one in (index, reordered, renamed)}) == 3


def test_an_unknown_split_names_those_there_are(index):
    with pytest.raises(UserError, match=r"no split 'trian' in .*: there is train\. Did you mean 'train'\?"):
        index.split("trian")


def test_a_missing_directory(tmp_path):
    with pytest.raises(UserError, match=r"directory .*nowhere does not exist.*make_shards.py KIND"):
        Index.load(tmp_path / "nowhere")


def test_a_directory_without_index(tmp_path):
    with pytest.raises(UserError, match=r"has no index\.json.*make_shards.py KIND SOURCE OUT .or index DIR"):
        Index.load(tmp_path)


def test_an_unknown_version(index):
    edit(index, lambda manifest: manifest.update(version=99))
    with pytest.raises(UserError, match="has version 99, and this code reads version 1"):
        Index.load(index.root)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 1}', '{"version": 1, "splits": [], "classes": []}'])
def test_a_malformed_manifest(index, text):
    (index.root / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json is malformed"):
        Index.load(index.root)


def test_a_manifest_that_points_outside(index):
    edit(index, lambda manifest: manifest["splits"]["train"]["shards"][0].update(name="../secret.tar"))
    with pytest.raises(UserError, match=r"malformed .*'\.\./secret\.tar' is not a plain file name"):
        Index.load(index.root)


@pytest.mark.parametrize("size", [0, 20, 200])
def test_a_truncated_offsets_file(index, size):
    path = index.root / "train.offsets.npy"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"cannot read the offsets .*train\.offsets\.npy"):
        Index.load(index.root)


def test_offsets_of_another_split(index):
    np.save(index.root / "train.offsets.npy", np.zeros(20, OFFSETS_DTYPE))
    with pytest.raises(UserError, match=r"holds \(20,\) rows .* the manifest counts 21 samples"):
        Index.load(index.root)


def test_pickled_offsets_are_never_loaded(index):
    np.save(index.root / "train.offsets.npy", np.array([{}], dtype=object))
    with pytest.raises(UserError, match="cannot read the offsets"):
        Index.load(index.root)


def test_a_missing_shard(index):
    (index.root / "train-000003.tar").unlink()
    with pytest.raises(UserError, match=r"shard .*train-000003\.tar of split 'train' is missing"):
        Index.load(index.root)


def test_a_shard_of_another_size(index):
    path = index.root / "train-000003.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(UserError, match=rf"train-000003\.tar has {size - 512} bytes and the manifest says {size}"):
        Index.load(index.root)
