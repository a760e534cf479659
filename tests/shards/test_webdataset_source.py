"""WebDataset tars as a source: what their samples are called, which class they are of, and that no image is read."""

import io
import os
import re
import tarfile
from pathlib import Path

import pytest
import webdataset
from foreign_tars import link, picture, sample, write_tar

from shards.engine import open_engine
from shards.errors import UserError
from shards.index import Index
from shards.reader import Reader
from shards.sources import webdataset as source_module
from shards.sources.base import Entry, Rejected, Source
from shards.sources.webdataset import RULE_OF_LISTED, WebDatasetTars, explain_21k_p
from shards.tars.in_place import ForeignOptions, index_in_place
from shards.writing.options import WriteOptions
from shards.writing.writer import write


def scan(source: Source):
    """Entries and rejected files."""
    found = list(source.scan())
    return [item for item in found if isinstance(item, Entry)], [item for item in found if isinstance(item, Rejected)]


def read(source: Source, entry: Entry) -> bytes:
    return source.fetcher()(entry.container, entry.name, entry.offset, entry.size)


def test_our_own_shards_give_back_their_source(index: Index, source: Path):
    again = WebDatasetTars(str(index.root))
    entries, rejected = scan(again)
    assert not rejected
    assert {entry.split for entry in entries} == {"train"}
    files = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in source.glob("*/*")}
    assert {f"{entry.class_name}/{entry.name}": read(again, entry) for entry in entries} == files


def test_our_own_shards_sharded_anew_are_the_same_bytes(index: Index, tmp_path):
    with open_engine("local", 1) as engine:
        write(WebDatasetTars(str(index.root)), tmp_path / "again", WriteOptions(shard_size="5"), engine)
    for shard in index.split("train").shards:
        assert (tmp_path / "again" / shard.name).read_bytes() == (index.root / shard.name).read_bytes()


def test_tars_of_webdatasets_own_writer(tmp_path):
    with webdataset.ShardWriter(f"{tmp_path}/imagenet_w21-train-%04d.tar", maxcount=2, verbose=0) as writer:
        for number in range(5):
            meta = {"filename": f"n0000000{number}/x_{number}.JPEG", "class_id": f"n0000000{number}", "label": number}
            writer.write({"__key__": f"{number:08d}", "webp": picture(number, "webp"), "cls": number, "json": meta})
    source = WebDatasetTars(str(tmp_path))
    entries, rejected = scan(source)
    assert not rejected
    assert [(entry.class_name, entry.name) for entry in entries] == [(f"n0000000{i}", f"x_{i}.JPEG") for i in range(5)]
    assert [read(source, entry) for entry in entries] == [picture(number, "webp") for number in range(5)]


@pytest.mark.parametrize(
    ("key", "meta", "class_name", "name"),
    [
        ("a", {"wnid": "c", "class_id": "d", "filename": "x.PNG"}, "c", "x.PNG"),
        ("a", {"synset": "c", "filename": "/deep/down/x.jpg"}, "c", "x.jpg"),
        ("dir.d/n01440764_7", {"filename": "x.tif"}, "n01440764", "n01440764_7.jpg"),
        ("n01440764_7", {"wnid": 5, "filename": "x.y.jpg"}, "n01440764", "n01440764_7.jpg"),
        ("n01440764_7", {"wnid": "n02", "filename": 5}, "n02", "n01440764_7.jpg"),
    ],
)
def test_class_and_name(tmp_path, key, meta, class_name, name):
    write_tar(tmp_path / "train-0.tar", sample(key, 0, **meta))
    entries, _ = scan(WebDatasetTars(str(tmp_path)))
    assert [(entry.class_name, entry.name) for entry in entries] == [(class_name, name)]


def test_classes_of_an_index(tmp_path):
    write_tar(tmp_path / "train-0.tar", sample("a", 1), sample("b", 0))
    _, rejected = scan(WebDatasetTars(str(tmp_path)))
    assert rejected[0] == (
        "train",
        "train-0.tar: 'a'",
        "no class: neither json nor key names one, and no index tells what label 1 is",
    )
    with open_engine("local", 1) as engine:
        index_in_place(tmp_path, ForeignOptions(classes=("cat", "dog")), engine, lambda images, num_bytes: None)
    entries, _ = scan(WebDatasetTars(str(tmp_path)))
    assert [entry.class_name for entry in entries] == ["dog", "cat"]
    write_tar(tmp_path / "val-0.tar", sample("a", 2))
    _, rejected = scan(WebDatasetTars(str(tmp_path)))
    assert rejected[0].reason == "no class: its label 2 is not among the 2 of an index"


def test_splits(tmp_path):
    write_tar(tmp_path / "imagenet1k-train-0000.tar", sample("a", 0, wnid="c"))
    write_tar(tmp_path / "imagenet1k-validation-00.tar", sample("b", 0, wnid="c"))
    assert [entry.split for entry in scan(WebDatasetTars(str(tmp_path)))[0]] == ["train", "validation"]
    assert [entry.split for entry in scan(WebDatasetTars(str(tmp_path), split="val"))[0]] == ["val", "val"]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("../a.jpg", picture(0)), ("../a.json", b'{"wnid": "c"}')], "'..' in its path"),
        ([link("a.jpg", "b"), ("a.json", b'{"wnid": "c"}')], "its jpg is a link"),
        ([("a.json", b'{"wnid": "c"}')], "no image: it has 'json'"),
        ([("a.jpg", b""), ("a.json", b'{"wnid": "c"}')], "its jpg has 0 bytes"),
        (sample("a", 0, wnid="../c"), r"its class '../c' and name 'a.jpg' make no key"),
        (sample("a", 0, wnid="c", filename="x\n.jpg"), r"name 'x\n.jpg' make no key"),
        (sample("good", 0, wnid="c"), "its key comes twice in the tar"),
        (sample("a", 0, wnid="n" * 300), "its class has a name of 300 characters"),
    ],
)
def test_samples_that_cannot_be(tmp_path, members, reason):
    write_tar(tmp_path / "train-0.tar", sample("good", 0, wnid="c"), sample("next", 0, wnid="c"), members)
    entries, rejected = scan(WebDatasetTars(str(tmp_path)))
    assert [entry.name for entry in entries] == ["good.jpg", "next.jpg"]
    assert len(rejected) == 1
    assert reason in rejected[0].reason
    assert rejected[0].where.startswith("train-0.tar: '")


def test_a_tar_that_is_cut_short(tmp_path):
    tar = write_tar(tmp_path / "train-0.tar", sample("a", 0, wnid="c"))
    os.truncate(tar, 700)
    with pytest.raises(UserError, match="damaged at byte"):
        scan(WebDatasetTars(str(tmp_path)))


def test_images_are_not_read(tmp_path):
    """A tar with a hole of 200 MiB for an image: reading it would show."""
    info = tarfile.TarInfo("a.jpg")
    info.size = 200 << 20
    label = io.BytesIO()
    with tarfile.open(fileobj=label, mode="w") as tar:
        meta = tarfile.TarInfo("a.json")
        meta.size = len(b'{"wnid": "c"}')
        tar.addfile(meta, io.BytesIO(b'{"wnid": "c"}'))
    with open(tmp_path / "train-0.tar", "wb") as file:
        file.write(info.tobuf())
        file.seek(info.size, os.SEEK_CUR)
        file.write(label.getvalue())
    before = bytes_read()
    entries, _ = scan(WebDatasetTars(str(tmp_path)))
    assert [entry.size for entry in entries] == [info.size]
    assert bytes_read() - before < 100_000


def bytes_read() -> int:
    """What this process has read by system calls."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


# --- 21k-P out of all of Winter 21


@pytest.fixture
def winter21(tmp_path) -> WebDatasetTars:
    """Classes of 60, 40 and 30 images, the second unlisted, in tars of one nominal split."""
    names = [(wnid, number) for wnid, count in (("n1", 60), ("n2", 40), ("n3", 30)) for number in range(count)]
    for number in range(2):
        members = [sample(f"{wnid}_{i}", 0, wnid=wnid, filename=f"{wnid}_{i}.JPEG") for wnid, i in names[number::2]]
        write_tar(tmp_path / f"imagenet_w21-train-{number:04d}.tar", *members)
    return WebDatasetTars(str(tmp_path), ("n1", "n3"), p_rule=RULE_OF_LISTED)


def test_other_classes_are_passed_over_and_counted(winter21):
    for _ in range(2):
        entries, rejected = scan(winter21)
        assert not rejected
        assert {entry.split for entry in entries} == {"train"}
        assert [sum(entry.class_name == name for entry in entries) for name in ("n1", "n2", "n3")] == [60, 0, 30]
        assert winter21.passed_over == {"n2": 40}


def test_the_first_50_names_of_each_class_validate(winter21, tmp_path):
    with open_engine("local", 1) as engine:
        write(winter21, tmp_path / "out", WriteOptions(), engine)
    written = Index.load(tmp_path / "out")
    assert written.classes == ("n1", "n3")
    keys = {
        split.name: {reader.key(position) for position in range(len(reader))}
        for split in written.splits
        if (reader := Reader(written, split.name))
    }
    names = sorted(f"n1_{number}.JPEG" for number in range(60))
    assert keys["train"] == {name.removesuffix(".JPEG") for name in names[50:]}
    assert keys["val"] == {name.removesuffix(".JPEG") for name in names[:50]} | {f"n3_{i}" for i in range(30)}


def test_why_counts_differ_from_21k_p(winter21):
    scan(winter21)
    lines = explain_21k_p(winter21, [10, 0], [50, 28], 2).split("\n  ")
    assert lines[0] == (
        "10 train and 78 val images; ImageNet-21k-P has 11,060,223 and 522,500: -11,060,213 and -522,422"
    )
    assert lines[1] == "40 images of 1 other classes are passed over"
    assert lines[2] == "2 images are left out here; the report says which and why"
    assert lines[3] == "11,582,633 of the 11,582,723 files of ImageNet-21k-P are not in these tars"
    assert lines[4] == source_module._PUBLIC
    assert lines[6] == "2 classes have fewer than the 501 files that the rule asks for: 'n1', 'n3'"
    assert lines[7] == "1 classes have 50 files or fewer, all in val and none in train: 'n3'"


def test_more_images_than_21k_p_has(winter21):
    text = explain_21k_p(winter21, [11_060_223, 501], [522_500, 50], 0)
    assert "551 files more than the 11,582,723 of ImageNet-21k-P are in these tars" in text
    assert "fewer" not in text
