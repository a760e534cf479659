"""Tars as sources: what is an image of which class, what is refused and why, and names files."""

import gzip
import io
import os
import tarfile
import time
import tracemalloc

import pytest

from shards.errors import UserError
from shards.sources.base import Entry, Rejected
from shards.sources.imagenet21k import Resized21k, Winter21
from shards.sources.names import Named
from shards.sources.tars import GzipRanges, TarOfImages

MIB = 1 << 20


def tar_of(files, layout=tarfile.GNU_FORMAT):
    """A tar of a {name: content}, where content is bytes, another such tar's {}, or the fields of a TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            data = content if isinstance(content, bytes) else b""
            for field, value in {"size": len(data), **(content if isinstance(content, dict) else {})}.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def save(path, files, **options):
    """The tar as a file, compressed where its name says so."""
    data = tar_of(files, **options)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def fetched(source):
    """{(class, name): bytes} of the images that a source finds, fetched in the order of the scan."""
    fetch = source.fetcher()
    found = [finding for finding in source.scan() if isinstance(finding, Entry)]
    return {(one.class_name, one.name): fetch(one.container, one.name, one.offset, one.size) for one in found}


def reasons(source):
    return {one.where.rpartition("some.tar/")[2]: one.reason for one in source.scan() if isinstance(one, Rejected)}


@pytest.fixture(params=["some.tar", "some.tar.gz"])
def place(request, tmp_path):
    return tmp_path / request.param


NESTED = {
    "n01.tar": tar_of({"n01_1.JPEG": b"one", "n01_2.JPEG": b"two" * 999}),
    "n02.tar": tar_of({"./n02_1.JPEG": b"three", "readme.txt": b"no image"}),
}


def test_a_tar_of_one_tar_a_class(place):
    source = TarOfImages(save(place, NESTED), "train")
    assert fetched(source) == {
        ("n01", "n01_1.JPEG"): b"one",
        ("n01", "n01_2.JPEG"): b"two" * 999,
        ("n02", "n02_1.JPEG"): b"three",
    }
    assert {(entry.split, entry.container) for entry in source.scan()} == {("train", str(place))}
    assert reasons(source) == {}


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_class_folders(place, layout):
    files = {
        "./": {"type": tarfile.DIRTYPE},
        "./train/cat/1.png": b"one",
        "./train/cat/.2.png": b"hidden",
        "./.git/cat/3.png": b"hidden",
        "./train/cat/._1.png": b"of a Mac",
        "./train/cat/notes.txt": b"no image",
        f"./train/{'d' * 120}/1.WebP": b"two",
        "./train/Käfer/n\udcff.jpg": b"three",
        "./empty.jpg/": {"type": tarfile.DIRTYPE},
    }
    assert fetched(TarOfImages(save(place, files, layout=layout), "train")) == {
        ("cat", "1.png"): b"one",
        ("d" * 120, "1.WebP"): b"two",
        ("Käfer", "n\udcff.jpg"): b"three",
    }


def test_folders_and_tars_in_one_tar(place):
    inner = tar_of({"top.jpg": b"one", "deeper/in.jpg": b"two"})
    source = TarOfImages(save(place, {"a/1.jpg": b"zero", "x/b.TAR": inner, "c/2.jpg": b"three"}), "train")
    assert fetched(source) == {
        ("a", "1.jpg"): b"zero",
        ("b", "top.jpg"): b"one",
        ("deeper", "in.jpg"): b"two",
        ("c", "2.jpg"): b"three",
    }
    offsets = [entry.offset for entry in source.scan()]
    assert offsets == sorted(offsets)


def test_an_empty_image_is_found_and_read(place):
    assert fetched(TarOfImages(save(place, {"a/1.jpg": b"", "a/2.jpg": b"x"}), "train"))["a", "1.jpg"] == b""


def test_only_gzip_must_be_read_in_order(tmp_path):
    plain, packed = save(tmp_path / "a.gz.tar", NESTED), save(tmp_path / "b.gz", NESTED)
    os.rename(packed, tmp_path / "b.tar")
    assert not TarOfImages(plain, "train").in_order
    assert TarOfImages(str(tmp_path / "b.tar"), "train").in_order


NO_FILE = "neither a file nor a folder, but a device, a pipe or a sparse file"
HOSTILE = {
    "a/../../x.jpg": (b"x", "'..' in its path"),
    "../x.txt": (b"x", "'..' in its path"),
    "/etc/x.jpg": (b"x", "an absolute path"),
    "a/symbolic.jpg": ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "a link"),
    "a/hard.jpg": ({"type": tarfile.LNKTYPE, "linkname": "a/1.jpg"}, "a link"),
    "a/device.jpg": ({"type": tarfile.CHRTYPE}, NO_FILE),
    "a/pipe.jpg": ({"type": tarfile.FIFOTYPE}, NO_FILE),
    "top.jpg": (b"x", "it lies in no class folder"),
    "a/n01.tar.gz": (b"x", "a compressed tar in a tar"),
    "a/n01.tgz": (b"x", "a compressed tar in a tar"),
    "b.tar": (tar_of({"c.tar": tar_of({"1.jpg": b"x"})}), "a tar in a tar in a tar"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_refused_and_why(tmp_path, name):
    content, reason = HOSTILE[name]
    source = TarOfImages(save(tmp_path / "some.tar", {"a/1.jpg": b"one", name: content, "a/2.jpg": b"two"}), "train")
    where = "b/c.tar" if name == "b.tar" else name.lstrip("/")
    assert reasons(source) == {f"{where}'": reason}
    assert fetched(source) == {("a", "1.jpg"): b"one", ("a", "2.jpg"): b"two"}


def test_names_are_printable_where_they_are_reported(tmp_path):
    link = {"type": tarfile.SYMTYPE}
    source = TarOfImages(save(tmp_path / "some.tar", {"a/\x1b[31m\udcff\n.jpg": link}), "train")
    assert list(reasons(source)) == [r"a/\x1b[31m\udcff\n.jpg'"]


def test_an_image_that_is_too_large_costs_no_memory(place):
    header = tarfile.TarInfo("a/bomb.jpg")
    header.size = 256 * MIB + 512
    with gzip.open(place, "wb", 1) if place.suffix == ".gz" else open(place, "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.seek(header.size, os.SEEK_CUR)
        file.write(tar_of({"a/1.jpg": b"x"}))
    tracemalloc.start()
    try:
        bomb, image = TarOfImages(str(place), "train").scan()
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()
    assert (bomb.reason, image.name) == ("it has 268435968 bytes, more than 268435456", "1.jpg")


@pytest.mark.parametrize("cut", [600, 1600, 3000])
def test_a_truncated_archive(tmp_path, cut):
    path = tmp_path / "n.tar"
    path.write_bytes(tar_of({"n01.tar": tar_of({"n01_1.JPEG": bytes(5000)})})[:cut])
    with pytest.raises(UserError, match=r"n\.tar' is no tar or damaged at byte"):
        list(TarOfImages(str(path), "train").scan())


def test_a_missing_archive(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the archive '.*gone.tar': No such file.*; check the path"):
        list(TarOfImages(str(tmp_path / "gone.tar"), "train").scan())


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(UserError, match=r"pipe.tar' is no regular file"):
        list(TarOfImages(str(tmp_path / "pipe.tar"), "train").scan())


@pytest.mark.parametrize("mode", ["bz2", "xz"])
def test_other_compressions(tmp_path, mode):
    path = str(tmp_path / "some.tar")
    tarfile.open(path, f"w:{mode}").close()
    with pytest.raises(UserError, match=r"compressed with (bzip2|xz), and only gzip is read; decompress it first"):
        list(TarOfImages(path, "train").scan())


# --- ranges of what gzip compressed


@pytest.fixture
def packed(tmp_path):
    (tmp_path / "data.gz").write_bytes(gzip.compress(bytes(range(250)) * 1000))
    return str(tmp_path / "data.gz")


def test_ranges_of_a_gzip_are_read_forward(packed):
    fetch = GzipRanges()
    assert fetch(packed, "a", 5, 3) == bytes([5, 6, 7])
    assert fetch(packed, "b", 8, 1) == bytes([8])
    assert fetch(packed, "c", 200_001, 2) == bytes([1, 2])
    with pytest.raises(ValueError, match="byte 9 lies before byte 200003, and gzip is read front to back"):
        fetch(packed, "d", 9, 1)
    assert fetch(packed, "e", 200_003, 1) == bytes([3])


def test_ranges_of_one_gzip_after_the_other(packed, tmp_path):
    other = str(tmp_path / "other.gz")
    with gzip.open(other, "wb") as file:
        file.write(b"others")
    fetch = GzipRanges()
    assert [fetch(packed, "a", 7, 1), fetch(other, "b", 0, 6), fetch(packed, "a", 3, 1)] == [b"\7", b"others", b"\3"]


@pytest.mark.parametrize(
    ("offset", "size", "cut", "message"),
    [
        (249_999, 2, None, "the archive ends after 1 of 2 bytes at offset 249999"),
        (300_000, 1, None, "the archive ends after 0 of 1 bytes at offset 300000"),
        (240_000, 1, -600, "the archive is damaged: Compressed file ended"),
        (0, 1, 5, "the archive is damaged: Compressed file ended"),
    ],
)
def test_ranges_that_a_gzip_lacks(packed, offset, size, cut, message):
    with open(packed, "rb+") as file:
        file.write(data := file.read()[:cut]) and file.truncate(len(data))
    with pytest.raises(OSError, match=message):
        GzipRanges()(packed, "a", offset, size)


# --- names files


ODD = {"a\tb\n/c\\n\udcff\r\u2028.jpg": b"one", "Käfer/\x85.jpg": b"two", "top.jpg": b"x", "d/1.jpg": b"three"}


def named(path, files=NESTED):
    """A names file to be, beside its archive."""
    return Named(TarOfImages(save(path, files), "train"), str(path.parent / "names.gz"))


def touch_nothing(path, data):
    """Overwrites a file with as many other bytes, and keeps its time."""
    status = os.stat(path)
    assert len(data) == status.st_size
    with open(path, "wb") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("files", [NESTED, ODD, {"readme.txt": b""}])
def test_names_are_the_findings_of_the_scan_again(place, files):
    source = named(place, files)
    findings = list(source.source.scan())
    assert list(source.scan()) == findings
    touch_nothing(place, b"?" * place.stat().st_size)
    assert list(source.scan()) == findings


def test_names_leave_the_rest_to_the_source(tmp_path):
    wrapped = Winter21(save(tmp_path / "n.tar.gz", NESTED), ("n01", "n02"))
    source = Named(wrapped, str(tmp_path / "names.gz"))
    assert (source.in_order, source.classes, source.p_rule) == (True, ("n01", "n02"), wrapped.p_rule)
    assert fetched(source) == fetched(wrapped)


def test_names_are_the_same_bytes_again(tmp_path):
    source = named(tmp_path / "n.tar")
    list(source.scan())
    first = (tmp_path / "names.gz").read_bytes()
    os.remove(tmp_path / "names.gz")
    list(source.scan())
    assert (tmp_path / "names.gz").read_bytes() == first


def test_names_of_another_archive_are_made_again(tmp_path):
    list(named(tmp_path / "n.tar").scan())
    other = named(tmp_path / "n.tar", {"b/new.jpg": b"new"})
    assert [one.name for one in other.scan()] == ["new.jpg"]
    assert [one.name for one in other.scan()] == ["new.jpg"]


def test_names_of_the_same_size_but_another_time_are_made_again(tmp_path):
    list(named(tmp_path / "n.tar", {"a/1.jpg": b""}).scan())
    source = named(tmp_path / "n.tar", {"a/2.jpg": b""})
    os.utime(tmp_path / "n.tar", (time.time(), time.time() + 7))
    assert [one.name for one in source.scan()] == ["2.jpg"]


def test_names_of_another_split_or_source_are_made_again(tmp_path):
    list(named(tmp_path / "n.tar").scan())
    path, names = str(tmp_path / "n.tar"), str(tmp_path / "names.gz")
    assert {one.split for one in Named(TarOfImages(path, "val"), names).scan()} == {"val"}
    assert {one.split for one in Named(Winter21(path), names).scan()} == {"train"}


def test_a_scan_that_ends_early_leaves_no_names(tmp_path):
    source = named(tmp_path / "n.tar")
    findings = source.scan()
    next(findings)
    assert len(os.listdir(tmp_path)) == 2
    findings.close()
    assert os.listdir(tmp_path) == ["n.tar"]


def test_a_damaged_archive_leaves_no_names(tmp_path):
    source = named(tmp_path / "n.tar")
    os.truncate(tmp_path / "n.tar", 1500)
    with pytest.raises(UserError, match="is no tar or damaged"):
        list(source.scan())
    assert os.listdir(tmp_path) == ["n.tar"]


def test_the_names_of_a_directory_are_not_kept(tmp_path):
    source = Named(Resized21k(str(tmp_path / "n")), str(tmp_path / "names.gz"))
    for name in ("1.jpg", "2.jpg"):
        folder = tmp_path / "n" / "imagenet21k_train" / "n01"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
        assert name in [one.name for one in source.scan()]
    assert os.listdir(tmp_path) == ["n"]


@pytest.mark.parametrize(
    "foreign",
    [b"my notes\n", gzip.compress(b"my notes\n"), gzip.compress(b'["x"]\n'), b""],
    ids=["text", "packed text", "packed JSON", "empty"],
)
def test_another_file_is_not_overwritten(tmp_path, foreign):
    source = named(tmp_path / "n.tar")
    (tmp_path / "names.gz").write_bytes(foreign)
    with pytest.raises(
        UserError, match=r"cannot use '.*names.gz' as the names file .*; delete it or give another path"
    ):
        list(source.scan())
    assert (tmp_path / "names.gz").read_bytes() == foreign


def without_line(number):
    def damage(data):
        lines = gzip.decompress(data).splitlines(keepends=True)
        return gzip.compress(b"".join(lines[:number] + lines[number + 1 :] if number != -1 else lines[:-1]))

    return damage


DAMAGES = {
    "cut": lambda data: data[:-20],
    "a wrong checksum": lambda data: data[:-8] + b"\0\0\0\0" + data[-4:],
    "a line less": without_line(2),
    "no end": without_line(-1),
    "more behind the end": lambda data: data + gzip.compress(b"train\ta\tb\t0\t0\n"),
    "a line of one column": lambda data: gzip.compress(gzip.decompress(data).replace(b"train\t", b"train-", 2)),
    "a number in letters": lambda data: gzip.compress(gzip.decompress(data).replace(b"\t3\n", b"\tthree\n")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_names_are_not_trusted(tmp_path, damage):
    source = named(tmp_path / "n.tar")
    list(source.scan())
    path = tmp_path / "names.gz"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(UserError, match=r"cannot use '.*names.gz' as the names file .* it is damaged: .*; delete it"):
        list(source.scan())
