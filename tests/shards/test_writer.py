"""Tars that are byte-reproducible, that everybody reads, and that are whole or not there."""

import fcntl
import io
import json
import os
import re
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.durable import atomic_file
from shards.engine import open_engine
from shards.errors import UserError
from shards.images import ImageOptions, read_header
from shards.index import Index
from shards.reader import Reader
from shards.sources.base import PRule
from shards.sources.folders import ClassFolders
from shards.tars import ustar
from shards.writing.options import WriteOptions
from shards.writing.writer import plan, read_report, write


def write_all(source, out, workers=1, **options):
    with open_engine("local", workers) as engine:
        return write(source, out, WriteOptions(**options), engine)


def triples_of_the_index(index):
    reader = Reader(index, "train")
    return {(reader.key(one), *reversed(reader.read(one, bytes))) for one in range(len(reader))}


def triples_of_tarfile(index):
    samples: dict[str, dict[str, bytes]] = {}
    for shard in index.split("train").shards:
        with tarfile.open(index.root / shard.name) as tar:
            for member in tar:
                key, field = member.name.split(".")
                samples.setdefault(key, {})[field] = tar.extractfile(member).read()
    return {(key, int(fields["cls"]), image_of(fields)) for key, fields in samples.items()}


def triples_of_webdataset(index):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webdataset's and torch's own
        import webdataset

        urls = [str(index.root / shard.name) for shard in index.split("train").shards]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    return {(fields["__key__"], int(fields["cls"]), image_of(fields)) for fields in samples}


def image_of(fields):
    (image,) = [fields[field] for field in ("jpg", "png", "webp") if field in fields]
    return image


def test_the_same_input_gives_the_same_bytes(source, written, files_of, tmp_path):
    written(source, tmp_path / "a")
    written(Path(shutil.copytree(source, tmp_path / "copy")), tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert {"index.json", "train.offsets.npy", "train.report.json", "_info.json", "sizes.json"} < set(
        files_of(tmp_path / "a")
    )


@pytest.mark.parametrize("options", [{"workers": 2}, {"in_order": True}, {"workers": 2, "in_order": True}])
def test_neither_processes_nor_the_order_of_reading_matter(source, written, files_of, tmp_path, options):
    write_all(ClassFolders(source, "train"), tmp_path / "other", shard_size="5", **options)
    assert files_of(tmp_path / "other") == files_of(written(source, tmp_path / "out").root)


def test_another_seed_gives_another_order_of_the_same_samples(index, source, written, tmp_path):
    other = written(source, tmp_path / "other", seed=1)
    assert triples_of_the_index(other) == triples_of_the_index(index)
    keys = [[Reader(one, "train").key(position) for position in range(21)] for one in (index, other)]
    assert keys[0] != keys[1]


def test_everybody_reads_the_same_samples(index):
    expected = triples_of_the_index(index)
    assert len(expected) == 21
    assert triples_of_tarfile(index) == expected
    assert triples_of_webdataset(index) == expected


def test_members_are_adjacent_plain_and_described(index):
    with tarfile.open(index.root / "train-000000.tar") as tar:
        members = tar.getmembers()
        metas = [json.load(tar.extractfile(member)) for member in members[2::3]]
    assert [member.name.split(".")[1] for member in members[1:3]] == ["cls", "json"]
    for image, label, meta in zip(members[::3], members[1::3], members[2::3], strict=True):
        assert len({member.name.split(".")[0] for member in (image, label, meta)}) == 1
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)
        assert member.isreg()
    key = members[0].name.split(".")[0]
    label, number = (int(part) for part in key[1:].split("_"))
    suffix = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[members[0].name.split(".")[1]]
    assert metas[0] == {
        "changes": "",
        "filename": f"{key}.{suffix}",
        "height": 8,
        "width": 12 + number,
        "wnid": f"c{label}",
    }


def test_the_field_is_told_from_the_bytes(index, source):
    names = set()
    for shard in index.split("train").shards:
        with tarfile.open(index.root / shard.name) as tar:
            names.update(tar.getnames()[::3])
    formats = {path.stem: read_header(path.read_bytes()).field for path in source.glob("*/*")}
    assert names == {f"{key}.{field}" for key, field in formats.items()}
    assert set(formats.values()) == {"jpg", "png", "webp"}


def test_every_shard_is_a_fair_sample(folders, written, tmp_path):
    index = written(folders(tmp_path / "even", classes=4, images=50), tmp_path / "out", shard_size=50)
    labels = index.offsets("train")["label"].reshape(4, 50)
    assert all(2 < count < 25 for shard in labels for count in np.bincount(shard, minlength=4))


def test_a_ustar_member_is_what_tarfile_writes():
    info = tarfile.TarInfo("n01440764_é.jpg")
    info.size = 700
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"z" * 700))
    member = ustar.member(info.name, b"z" * 700)
    assert buffer.getvalue().startswith(member + ustar.END)
    assert ustar.member_name(member[:512]) == info.name
    with pytest.raises(ValueError, match="a ustar name has 100 bytes at most"):
        ustar.member("x" * 101, b"")


def test_splits_share_a_directory(index, folders, written, tmp_path):
    before = {path.name: path.read_bytes() for path in index.root.glob("train*")}
    both = written(folders(tmp_path / "val", images=2), index.root, split="val")
    assert [split.name for split in both.splits] == ["train", "val"]
    assert both.split("val").num_samples == 6
    assert both.split("train") == index.split("train")
    assert both.fingerprint("train") == index.fingerprint("train")
    assert before == {path.name: path.read_bytes() for path in index.root.glob("train*")}


def test_splits_must_agree_on_their_classes(index, folders, written, tmp_path):
    val = folders(tmp_path / "val")
    (val / "c1").rename(val / "c7")
    with pytest.raises(UserError, match=r"classes of 'val' differ .*missing c1; extra c7"):
        written(val, index.root, split="val")
    assert Index.load(index.root) == index


def test_splits_must_agree_on_the_order_of_their_classes(index, source):
    """Else the labels of one of them would be other classes without a word."""
    with pytest.raises(UserError, match=r"classes of 'val' differ .*: they are in another order"):
        write_all(ClassFolders(source, "val", ("c1", "c0", "c2")), index.root)
    assert Index.load(index.root) == index
    assert not list(index.root.glob("*.unfinished"))


def test_a_finished_split_is_left_as_it_is(index, source):
    before = {path: path.stat().st_mtime_ns for path in index.root.glob("*[!k]")}
    (written,) = write_all(ClassFolders(source, "train"), index.root, shard_size="5")
    assert written.already_complete
    assert written.split == index.split("train")
    assert before == {path: path.stat().st_mtime_ns for path in index.root.glob("*[!k]")}


def test_what_a_kill_after_the_manifest_leaves_is_removed(index, source, files_of):
    expected = files_of(index.root)
    work = index.root / "train.unfinished"
    work.mkdir()
    (work / "made_from.json").write_text("{}")
    (written,) = write_all(ClassFolders(source, "train"), index.root, shard_size="5")
    assert written.already_complete
    assert files_of(index.root) == expected


def test_a_finished_split_refuses_other_options_and_sources(index, source, written, image):
    text = r"'train' in .* is finished.*\(shards: 5 there, 4 asked; shard size: 5 there, 6 asked; seed: 0 there, 1"
    with pytest.raises(UserError, match=text):
        written(source, index.root, shard_size=6, seed=1)
    (source / "c0/new.jpg").write_bytes(image(0))
    with pytest.raises(UserError, match=r"images: 21 there, 22 asked; source listing: .*choose another OUT"):
        written(source, index.root)


BAD = {
    "c0/empty.jpg": (b"", "the file is empty"),
    "c1/text.png": (b"<html>404", "neither JPEG, PNG nor WebP"),
    "c2/cut.jpg": (b"\xff\xd8\xff\xe0", "JPEG"),
    "c2/new.JPEG": (b"GIF89a", "47 49"),
}


@pytest.fixture
def with_bad_images(source):
    for name, (data, _) in BAD.items():
        (source / name).write_bytes(data)
    return source


def test_unreadable_images_are_listed_together(with_bad_images, written, tmp_path):
    with pytest.raises(UserError, match=r"4 of 25 files .* the budget of 0\.01% allows 0\. .*--max-bad") as error:
        written(with_bad_images, tmp_path / "out")
    for name, (_, reason) in BAD.items():
        assert any(name in line and reason in line for line in str(error.value).splitlines())
    with pytest.raises(UserError, match="has no index"):
        Index.load(tmp_path / "out")


@pytest.mark.parametrize("in_order", [False, True])
def test_a_budget_leaves_them_out_and_reports_them(with_bad_images, folders, written, files_of, tmp_path, in_order):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="allows 3"):
        write_all(ClassFolders(with_bad_images, "train"), out, max_bad="3", in_order=in_order)
    write_all(ClassFolders(with_bad_images, "train"), out, max_bad="16%", in_order=in_order)
    report = read_report(out, "train")
    assert {name: reason for name, (_, reason) in BAD.items()}.keys() == {
        file["file"].strip("'") for file in report["files"]
    }
    assert (report["written"], report["dropped"], report["changed"]) == (21, 4, 0)
    index = Index.load(out)
    assert index.split("train").num_samples == 21
    clean = written(folders(tmp_path / "clean"), tmp_path / "without")
    assert triples_of_the_index(index) == triples_of_the_index(clean)


def test_what_could_not_be_read_is_tried_again(with_bad_images, written, tmp_path):
    """The same names and sizes: the bytes that a bad disk gave, and those that it gives now."""
    good = with_bad_images / "c0/c0_00000.JPEG"
    data = good.read_bytes()
    for name in BAD:
        (with_bad_images / name).unlink()
    good.write_bytes(bytes(len(data)))
    with pytest.raises(UserError, match="1 of 21 files"):
        written(with_bad_images, tmp_path / "out")
    good.write_bytes(data)
    assert written(with_bad_images, tmp_path / "out").split("train").num_samples == 21


def test_a_long_list_of_unreadable_images_is_cut(source, written, tmp_path):
    for number in range(30):
        (source / f"c0/{number}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"files cannot be samples") as error:
        written(source, tmp_path / "out")
    assert len(str(error.value).splitlines()) == 21


def test_a_file_that_vanishes(source, tmp_path):
    out = tmp_path / "out"
    broken = Vanishing(source, "train")
    with pytest.raises(UserError, match=r"c0_00001\.JPEG'?: it cannot be read \(No such file or directory\)"):
        write_all(broken, out)


class Vanishing(ClassFolders):
    """A file that is gone once the source has been listed."""

    def scan(self):
        yield from super().scan()
        (self.path / "c0/c0_00001.JPEG").unlink()


def test_minival_is_balanced_and_taken_from_train(folders, tmp_path):
    source = ClassFolders(folders(tmp_path / "many", classes=4, images=30), "train")
    write_all(source, tmp_path / "out", minival="10%", shard_size="7")
    write_all(source, tmp_path / "other", minival="10%", shard_size="7", seed=1)
    index, other = Index.load(tmp_path / "out"), Index.load(tmp_path / "other")
    keys = {split.name: {Reader(index, split.name).key(i) for i in range(split.num_samples)} for split in index.splits}
    assert np.bincount(index.offsets("minival")["label"]).tolist() == [3] * 4
    assert len(keys["train"] | keys["minival"]) == 120
    assert not keys["train"] & keys["minival"]
    assert keys["minival"] != {Reader(other, "minival").key(i) for i in range(12)}


def test_only_the_splits_asked_for(folders, tmp_path):
    source = ClassFolders(folders(tmp_path / "many", images=8), "train")
    write_all(source, tmp_path / "out", minival="25%", splits=("minival",))
    assert [split.name for split in Index.load(tmp_path / "out").splits] == ["minival"]
    with pytest.raises(UserError, match=r"the source has no split test; it has train"):
        write_all(source, tmp_path / "out", splits=("test",))


def test_shard_sizes_in_bytes(folders, tmp_path):
    source = ClassFolders(folders(tmp_path / "many", images=40), "train")
    write_all(source, tmp_path / "out", shard_size="64KiB")
    sizes = [shard.num_bytes for shard in Index.load(tmp_path / "out").split("train").shards]
    assert len(sizes) > 3
    assert all(0.6 < size / 65536 < 1.1 for size in sizes)


def test_a_plan_leaves_no_trace(source, files_of, tmp_path):
    begun = plan(ClassFolders(source, "train"), tmp_path / "out", WriteOptions(shard_size="5"))
    (task,) = begun.tasks
    assert (task.job.num_images, task.job.num_shards, begun.index.classes) == (21, 5, ("c0", "c1", "c2"))
    assert files_of(tmp_path / "out") == {".lock": b""}
    write_all(ClassFolders(source, "train"), tmp_path / "out", shard_size="5")
    again = plan(ClassFolders(source, "train"), tmp_path / "out", WriteOptions(shard_size="5"))
    assert (again.tasks, [split.name for split in again.finished]) == ((), ["train"])
    with pytest.raises(UserError, match="made from another source or with other options"):
        plan(ClassFolders(source, "train"), tmp_path / "out", WriteOptions(shard_size="6"))
    written = Index.load(tmp_path / "out").split("train").num_bytes
    assert task.num_bytes == pytest.approx(written, rel=0.1)


def test_images_are_changed_as_asked(source, tmp_path):
    images = ImageOptions(resize="squash:16", format="jpg", quality=80)
    write_all(ClassFolders(source, "train"), tmp_path / "out", images=images)
    index = Index.load(tmp_path / "out")
    reader = Reader(index, "train")
    headers = [read_header(reader.read(position, bytes)[0]) for position in range(21)]
    assert {header.field for header in headers} == {"jpg"}
    assert {(header.width, header.height) for header in headers} == {(12, 8), (13, 8), (14, 8), (15, 8), (16, 16)}
    report = read_report(tmp_path / "out", "train")
    assert report["changed"] > 0
    assert index.split("train").made_from["resize"] == "squash:16"


def test_one_writer_at_a_time(index, folders, written, tmp_path):
    val = folders(tmp_path / "val")
    with open(index.root / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing shards to"):
            written(val, index.root, split="val")
    assert written(val, index.root, split="val").split("val").num_samples == 21


def test_shards_of_others_are_not_overwritten(source, written, files_of, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-000007.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"holds train-000007\.tar, which is in no index here and would be overwritten"):
        written(source, out)
    assert files_of(out) == {".lock": b"", "train-000007.tar": b"precious"}


def test_temporary_files_are_removed(source, written, files_of, tmp_path):
    expected = files_of(written(source, tmp_path / "clean").root)
    out = tmp_path / "out"
    out.mkdir()
    for name in ("train-000099.tar", "train.offsets.npy", "index.json"):
        (out / f"{name}.123.tmp").write_bytes(b"half")
    assert files_of(written(source, out).root) == expected


def test_an_out_that_is_a_file(source, written, tmp_path):
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot write .*/out: File exists"):
        written(source, tmp_path / "out")


def test_a_full_disk(tmp_path):
    """/dev/full answers every write as a full disk does."""
    (tmp_path / f"x.tar.{os.getpid()}.tmp").symlink_to("/dev/full")
    text = r"cannot write .*x\.tar: No space left on device \(\d+ bytes are free\)\. Make room"
    with pytest.raises(UserError, match=text), atomic_file(tmp_path / "x.tar") as file:
        file.write(bytes(4096))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"splits": ("a/b",)}, "'a/b' cannot name a split"),
        ({"splits": ("",)}, "'' cannot name a split"),
        ({"shard_size": "0"}, "a shard size of '0': give images, as in 5000, or bytes, as in 500MB"),
        ({"shard_size": "5 pounds"}, "a shard size of '5 pounds'"),
        ({"max_bad": "many"}, "a budget of bad samples of 'many': give a percentage"),
        ({"max_bad": "101%"}, "a budget of bad samples of '101%'"),
        ({"minival": "60%"}, "a minival of '60%': give more than 0% and 50% at most"),
        ({"minival": "1"}, "a minival of '1': give a percentage"),
    ],
)
def test_options_are_checked(options, text):
    with pytest.raises(UserError, match=re.escape(text)):
        WriteOptions(**options)


def test_images_in_shards_decode(index):
    reader = Reader(index, "train")
    for position in range(len(reader)):
        data, _ = reader.read(position, bytes)
        with Image.open(io.BytesIO(data)) as image:
            image.load()


class Cut(ClassFolders):
    """All of it validates."""

    p_rule = PRule(min_images=1)


def test_splits_that_nothing_is_left_for(folders, tmp_path):
    few = folders(tmp_path / "few", images=1)
    with pytest.raises(UserError, match="the source has no split minival; it has train"):
        write_all(ClassFolders(few, "train"), tmp_path / "out", minival="50%", splits=("minival",))
    with pytest.raises(UserError, match="split 'train' has no image left: all classes are too small"):
        write_all(Cut(few, "train"), tmp_path / "out")
