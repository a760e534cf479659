"""Tars that are byte-reproducible, that everybody reads, and that are whole or not there."""

import fcntl
import io
import json
import os
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import ustar
from shards.durable import atomic_file
from shards.errors import UserError
from shards.images import BadImage, read_header
from shards.index import Index
from shards.reader import Reader
from shards.sources import class_folders
from shards.writer import WriteOptions, write_split


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
    assert set(files_of(tmp_path / "a")) == {
        ".lock",
        "index.json",
        "train.offsets.npy",
        *(f"train-{number:06d}.tar" for number in range(5)),
    }


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
    assert metas[0] == {"wnid": f"c{label}", "filename": f"{key}.JPEG", "width": 12 + number, "height": 8}


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


def test_a_finished_split_is_left_as_it_is(index, source):
    before = {path: path.stat().st_mtime_ns for path in index.root.glob("*[!k]")}
    written = write_split(*class_folders(source), index.root, WriteOptions("train", 5))
    assert written.already_complete
    assert written.split == index.split("train")
    assert before == {path: path.stat().st_mtime_ns for path in index.root.glob("*[!k]")}


def test_a_finished_split_refuses_other_options_and_sources(index, source, written, image):
    with pytest.raises(UserError, match=r"'train' in .* is finished.*\(shard size: 5 there, 6 asked; seed: 0 there, 1"):
        written(source, index.root, shard_size=6, seed=1)
    (source / "c0/new.jpg").write_bytes(image(0))
    with pytest.raises(UserError, match=r"images: 21 there, 22 asked; source listing: .*choose another OUT"):
        written(source, index.root)


def test_unreadable_images_are_listed_together(source, written, tmp_path):
    bad = {
        "c0/empty.jpg": b"",
        "c1/text.png": b"<html>404",
        "c2/cut.jpg": b"\xff\xd8\xff\xe0",
        "c2/c2_00001.JPEG": b"GIF89a",
    }
    for name, data in bad.items():
        (source / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        written(source, tmp_path / "out")
    for name, reason in zip(
        bad, ("is empty", "neither JPEG, PNG nor WebP", "JPEG header cannot be read", "47 49"), strict=True
    ):
        assert any(str(source / name) in line and reason in line for line in str(error.value).splitlines())
    with pytest.raises(UserError, match="has no index"):
        Index.load(tmp_path / "out")
    shutil.rmtree(source / "c2")
    for name in list(bad)[:2]:
        (source / name).unlink()
    assert written(source, tmp_path / "out").split("train").num_samples == 14


def test_a_long_list_of_unreadable_images_is_cut(source, written, tmp_path):
    for number in range(30):
        (source / f"c0/{number}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"the first 20; there may be more") as error:
        written(source, tmp_path / "out")
    assert len(str(error.value).splitlines()) == 21


def test_a_file_that_vanishes(source, tmp_path):
    classes, samples = class_folders(source)
    (source / "c0/c0_00001.JPEG").unlink()
    with pytest.raises(UserError, match=r"c0_00001\.JPEG: it cannot be read \(No such file or directory\)"):
        write_split(classes, samples, tmp_path / "out", WriteOptions("train"))


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


@pytest.mark.parametrize("options", [{"split": "a/b"}, {"split": ""}, {"split": "train", "shard_size": 0}])
def test_options_are_checked(options):
    with pytest.raises(UserError, match=r"cannot name a split|must be at least 1"):
        WriteOptions(**options)


@pytest.mark.parametrize(("image_format", "field"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_headers(image, image_format, field):
    header = read_header(image(0, image_format, (31, 17)))
    assert (header.field, header.width, header.height) == (field, 31, 17)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_every_cut_of_a_header_is_a_bad_image_or_a_size(image, image_format):
    data = image(0, image_format)
    for size in range(0, 200, 3):
        try:
            header = read_header(data[:size])
        except BadImage:
            continue
        assert (header.width, header.height) == (12, 8)


def test_images_in_shards_decode(index):
    reader = Reader(index, "train")
    for position in range(len(reader)):
        data, _ = reader.read(position, bytes)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
