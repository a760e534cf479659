"""An index made anew from the tars is the one that was there; and it is not made from tars that give none."""

import json
import shutil

import numpy as np
import pytest

from shards.checking.check import CheckOptions, check_directory
from shards.checking.repair import repair_index
from shards.durable import locked
from shards.engine import open_engine
from shards.errors import UserError
from shards.index import Index
from shards.tars import ustar
from shards.tars.in_place import ForeignOptions, index_in_place


def repair(root, classes=()):
    with open_engine("local", 1) as engine:
        return repair_index(root, classes, engine)


def num_errors(root):
    with open_engine("local", 1) as engine:
        return check_directory(root, CheckOptions(), engine).num_errors


def test_a_sound_index_stays_as_it_is(index, files_of):
    before = files_of(index.root)
    assert repair(index.root) == ("train: 21 images in 5 shards, as before",)
    assert files_of(index.root) == before


@pytest.mark.parametrize("damage", ["missing", "junk", "swapped labels"])
def test_offsets(index, files_of, damage):
    before, path = files_of(index.root), index.root / "train.offsets.npy"
    if damage == "swapped labels":
        rows = np.load(path)
        rows["label"] = np.roll(rows["label"], 1)
        np.save(path, rows)
    else:
        path.unlink() if damage == "missing" else path.write_bytes(b"junk")
    assert repair(index.root) == ("train: 21 images in 5 shards, before: 21 images in 5 shards",)
    assert files_of(index.root) == before


@pytest.mark.parametrize("content", [None, "", "{}"])
def test_a_lost_manifest(index, source, written, content):
    """Tars that were copied alone: the samples are the same, and what they were made from is not known any more."""
    written(source, index.root, "val", shard_size=50)
    before = Index.load(index.root)
    rows = {split.name: np.array(before.offsets(split.name)) for split in before.splits}
    manifest = index.root / "index.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    for name in ("_info.json", "sizes.json", "train.offsets.npy"):
        (index.root / name).unlink()
    aside = "" if content is None else "; what was there is index.json.broken now"
    assert repair(index.root) == (
        f"index.json was made from the tars{aside}",
        "train: 21 images in 5 shards",
        "val: 21 images in 1 shards",
    )
    after = Index.load(index.root)
    assert after.classes == before.classes
    assert [split.shards for split in after.splits] == [split.shards for split in before.splits]
    for name, expected in rows.items():
        assert after.offsets(name).tolist() == expected.tolist()
    assert json.loads((index.root / "sizes.json").read_bytes())["val-000000.tar"] == 21
    assert num_errors(index.root) == 0


def test_tars_that_differ_from_the_manifest(index):
    """The index follows the tars, and make_shards no longer takes the split for what it wrote."""
    (index.root / "train-000004.tar").unlink()
    shutil.copy(index.root / "train-000001.tar", index.root / "train-000002.tar")
    assert repair(index.root) == ("train: 17 images in 4 shards, before: 21 images in 5 shards",)
    after = Index.load(index.root)
    assert after.split("train").made_from == {"repaired": "from tars"}
    assert [shard.sha256 for shard in after.split("train").shards][1:3] == [index.split("train").shards[1].sha256] * 2


def test_a_split_that_was_indexed_in_place_is_left_alone(index, image):
    tar = ustar.member("a.jpg", image(0)) + ustar.member("a.cls", b"2") + ustar.END
    (index.root / "own-test-0000.tar").write_bytes(tar)
    with open_engine("local", 1) as engine:
        index_in_place(index.root, ForeignOptions(), engine, lambda images, num_bytes: None)
    (index.root / "train.offsets.npy").unlink()
    (index.root / "test.offsets.npy").write_bytes(b"junk")
    assert repair(index.root) == (
        "test: left as it is; python tools/make_shards.py index made it, and repairs it",
        "train: 21 images in 5 shards, before: 21 images in 5 shards",
    )
    assert (index.root / "test.offsets.npy").read_bytes() == b"junk"
    Index.read(index.root).offsets("train")


def test_tars_that_give_no_index(index):
    path, manifest = index.root / "train-000001.tar", (index.root / "index.json").read_bytes()
    whole = path.read_bytes()
    path.write_bytes(whole[:-2000])
    with pytest.raises(UserError, match=r"train-000001\.tar' is no tar or damaged"):
        repair(index.root)
    path.write_bytes(whole.replace(b'"wnid": "c', b'"wnid": "d'))
    with pytest.raises(UserError, match=r"label \d is class 'c\d' in index\.json, and 'd\d' in train-000001\.tar"):
        repair(index.root)
    path.write_bytes(whole.replace(b'"wnid"', b'"wnid}', 1))
    with pytest.raises(UserError, match=r"1 samples of train-000001\.tar cannot be indexed; copy it again:\n  train-"):
        repair(index.root)
    assert (index.root / "index.json").read_bytes() == manifest


def test_a_lost_manifest_and_tars_that_give_none(index):
    path = index.root / "train-000001.tar"
    path.write_bytes(path.read_bytes().replace(b'"wnid": "c', b'"wnid": "d'))
    (index.root / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"label \d is class 'c\d', and in train-000001\.tar it is class 'd\d'"):
        repair(index.root)
    assert (index.root / "index.json").read_text() == "{"
    assert not (index.root / "index.json.broken").exists()


def test_no_tars(index, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        repair(tmp_path / "nowhere")
    for path in index.root.glob("*.tar"):
        path.rename(path.with_name(f"other-{path.name}"))
    with pytest.raises(UserError, match=r"none of the tars of split 'train' is in .*; copy them there first"):
        repair(index.root)


def test_a_manifest_that_leads_out_of_its_directory(index):
    path = index.root / "index.json"
    path.write_bytes(path.read_bytes().replace(b'"train"', b'"../train"'))
    with pytest.raises(UserError, match=r"malformed \(ValueError: '\.\./train\.offsets\.npy' is not a plain file name"):
        Index.load(index.root)
    repair(index.root)
    assert not (index.root.parent / "train.offsets.npy").exists()
    assert [split.name for split in Index.load(index.root).splits] == ["train"]


def test_a_running_make_shards(index):
    with locked(index.root), pytest.raises(UserError, match="another process is writing shards"):
        repair(index.root)


def test_a_class_list_for_a_lost_manifest(index):
    (index.root / "index.json").unlink()
    repair(index.root, ("c0", "c1", "c2", "c3"))
    assert Index.load(index.root).classes == ("c0", "c1", "c2", "c3")
