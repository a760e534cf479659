"""The validation images of ILSVRC 2012, a flat tar, and its devkit, whose class ids are in an order of their own."""

import gzip
import io
import sys
import tarfile

import numpy as np
import pytest
from scipy.io import savemat

from shards.errors import UserError
from shards.sources.base import Entry, Rejected
from shards.sources.ilsvrc import IlsvrcVal

WNIDS = ("n01440764", "n01443537", "n02119789")
IDS = {1: "n02119789", 2: "n01443537", 3: "n01440764"}
TRUTH = (3, 1, 2, 1)
INSIDE = "ILSVRC2012_devkit_t12/data"
# Of the real meta.mat.
FIELDS = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train_images")


def synsets(ids=IDS, compress=True):
    """meta.mat of the devkit: the classes, then a synset above them."""
    rows = [(number, wnid, "tench, Tinca", "a fish", 0, np.zeros((1, 0)), 0, 1300) for number, wnid in ids.items()]
    rows.append((1001, "n00001740", "entity", "all there is", len(ids), np.array([list(ids)]), 19, 0))
    return mat(compress, synsets=np.array(rows, [(name, object) for name in FIELDS]).reshape(-1, 1))


def mat(compress=True, **variables):
    buffer = io.BytesIO()
    savemat(buffer, variables, do_compression=compress)
    return buffer.getvalue()


def devkit_files(**changes):
    truth = "".join(f"{label}\n" for label in TRUTH).encode()
    files = {"meta.mat": synsets(), "ILSVRC2012_validation_ground_truth.txt": truth} | changes
    return {f"{INSIDE}/{name}": data for name, data in files.items() if data is not None}


def tar_of(path, files, mode="w"):
    """A tar of files by name; None for a link to nowhere good."""
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            if data is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data or b""))
    return path


def images(*numbers):
    return {f"ILSVRC2012_val_{number:08d}.JPEG": b"image %d" % number for number in numbers}


FOUR = images(1, 2, 3, 4)


@pytest.fixture
def scan(tmp_path):
    """Scans a tar of `files` with a devkit of the files `devkit`."""

    def scan(files=FOUR, devkit=None, classes=WNIDS):
        tar = tar_of(tmp_path / "val.tar", files)
        kit = tar_of(tmp_path / "devkit.tar.gz", {"readme.txt": b"text"} | (devkit or devkit_files()), "w:gz")
        return list(IlsvrcVal(str(tar), str(kit), classes).scan())

    return scan


def test_images_with_their_labels(scan, tmp_path):
    found = scan()
    assert [(one.split, one.class_name, one.name) for one in found] == [
        ("val", IDS[label], f"ILSVRC2012_val_{number:08d}.JPEG") for number, label in enumerate(TRUTH, 1)
    ]
    fetch = IlsvrcVal(str(tmp_path / "val.tar"), "", WNIDS).fetcher()
    assert [fetch(one.container, one.name, one.offset, one.size) for one in found] == list(FOUR.values())


def test_the_order_of_the_tar_does_not_matter(scan):
    assert sorted(one[1:3] for one in scan(images(4, 1, 3, 2))) == sorted(one[1:3] for one in scan())


def test_images_in_a_folder(scan):
    files = {f"./val/{name}": data for name, data in FOUR.items()} | {
        "val/._x.JPEG": b"",
        "val/a.txt": b"",
    }
    assert [one[1:3] for one in scan(files)] == [one[1:3] for one in scan()]


@pytest.mark.parametrize("inside", [".", "ILSVRC2012_devkit_t12", INSIDE])
def test_an_extracted_devkit(scan, tmp_path, inside):
    expected = scan()
    with tarfile.open(tmp_path / "devkit.tar.gz") as tar:
        tar.extractall(tmp_path / "kit", filter="data")
    assert list(IlsvrcVal(str(tmp_path / "val.tar"), str(tmp_path / "kit" / inside), WNIDS).scan()) == expected


def test_a_link_is_rejected(scan, tmp_path):
    found = scan(images(1, 2, 3) | {"ILSVRC2012_val_00000004.JPEG": None})
    assert [type(one) for one in found] == [Entry, Entry, Entry, Rejected]
    assert found[-1].where == f"'{tmp_path}/val.tar': 'ILSVRC2012_val_00000004.JPEG'"
    assert found[-1].reason == "no regular file but of kind 'link'"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            images(1, 2, 4),
            r"holds 3 images, and the devkit has 4 labels: 'ILSVRC2012_val_00000003\.JPEG' missing",
        ),
        (
            images(1, 2, 3, 4, 5),
            r"holds ILSVRC2012_val_00000005\.JPEG, and the devkit has labels of images 1 to 4",
        ),
        (images(0, 1, 2, 3, 4), r"holds ILSVRC2012_val_00000000\.JPEG, and the devkit has labels of images 1 to 4"),
        (images(1) | {"a/ILSVRC2012_val_00000001.JPEG": b""}, r"holds ILSVRC2012_val_00000001\.JPEG twice; download"),
        (
            {"n01440764/n01440764_1.JPEG": b""},
            r"holds 'n01440764_1\.JPEG', and ILSVRC2012_img_val\.tar only",
        ),
        ({"n01440764.tar": b""}, r"holds 0 images, and the devkit has 4 labels"),
    ],
)
def test_a_wrong_set_of_images(scan, files, message):
    with pytest.raises(UserError, match=message):
        scan(files)


def test_a_tar_that_is_cut_short(scan, tmp_path):
    scan()
    data = (tmp_path / "val.tar").read_bytes()
    (tmp_path / "val.tar").write_bytes(data[:1030])
    with pytest.raises(UserError, match=r"val\.tar' is no tar or damaged at byte 1024: "):
        list(IlsvrcVal(str(tmp_path / "val.tar"), str(tmp_path / "devkit.tar.gz"), WNIDS).scan())


def test_a_missing_tar(scan, tmp_path):
    scan()
    with pytest.raises(UserError, match=r"cannot read '.*nowhere': No such file or directory; give ILSVRC2012_img_val"):
        list(IlsvrcVal(str(tmp_path / "nowhere"), str(tmp_path / "devkit.tar.gz"), WNIDS).scan())


RIGHT = r"; give ILSVRC2012_devkit_t12\.tar\.gz \(2\.5 MB\), or the folder that it extracts to$"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta.mat": None}, r"devkit\.tar\.gz' holds no data/meta\.mat"),
        ({"ILSVRC2012_validation_ground_truth.txt": None}, r"holds no data/ILSVRC2012_validation_ground_truth\.txt"),
        ({"ILSVRC2012_validation_ground_truth.txt": b"3\n9\n"}, r"line 2 of .* is '9', not one of its 3 class ids"),
        ({"ILSVRC2012_validation_ground_truth.txt": b"3\n\n1"}, r"line 2 of .* is '', not one of its 3 class ids"),
        ({"ILSVRC2012_validation_ground_truth.txt": b"n0144"}, r"line 1 of .* is 'n0144', not one of its 3 class ids"),
        ({"meta.mat": b"not MATLAB's" * 99}, r"meta\.mat of .*' is not the table of ILSVRC 2012's synsets \(\w+: .*\)"),
        ({"meta.mat": synsets()[:-100]}, r"meta\.mat of .*' is not the table of ILSVRC 2012's synsets \(\w+: .*\)"),
        ({"meta.mat": mat(other=[1])}, r"is not the table of ILSVRC 2012's synsets \(KeyError: 'synsets'\)"),
        (
            {"meta.mat": mat(synsets=[[1]])},
            r"\(ValueError: synsets is a int64 array of \(1, 1\), not a struct .*\)",
        ),
        (
            {"meta.mat": synsets({1: WNIDS[0], 2: WNIDS[0], 3: WNIDS[1]})},
            r"has an id or a wnid twice among its 3 classes",
        ),
    ],
)
def test_a_wrong_devkit(scan, changes, message):
    with pytest.raises(UserError, match=message + RIGHT):
        scan(devkit=devkit_files(**changes))


def test_classes_of_another_list(scan):
    with pytest.raises(UserError, match=r"meta\.mat of .*devkit\.tar\.gz' has 3 classes and must have 2"):
        scan(classes=WNIDS[:2])


def test_a_header_that_claims_a_thousand_million_synsets(scan):
    dimensions, claim = (np.array([rows, 1], "<i4").tobytes() for rows in (4, 1 << 30))
    data = synsets(compress=False).replace(dimensions, claim, 1)
    with pytest.raises(UserError, match=r"synsets is a struct array of \(1073741824, 1\), not .* of at most 100000"):
        scan(devkit=devkit_files(**{"meta.mat": data}))


def other_files(tmp_path):
    tar_of(tmp_path / "plain.tar", devkit_files())
    tar_of(tmp_path / "images.tar.gz", images(1), "w:gz")
    (tmp_path / "text.txt").write_text("labels")
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "devkit.tar.gz").read_bytes()[:400])
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"text" * 999))
    (tmp_path / "folder").mkdir()
    with open(tmp_path / "large.tar", "wb") as file:
        file.truncate((64 << 20) + 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plain.tar", r"plain\.tar' cannot be read as the devkit \(.*Not a gzipped file.*\)"),
        ("images.tar.gz", r"images\.tar\.gz' holds no data/ILSVRC2012_validation_ground_truth\.txt"),
        ("text.txt", r"text\.txt' cannot be read as the devkit \(.*Not a gzipped file.*\)"),
        ("text.gz", r"text\.gz' cannot be read as the devkit \(.* is no tar or damaged .*\)"),
        ("cut.tar.gz", r"cut\.tar\.gz' cannot be read as the devkit \(.*\)"),
        ("folder", r"folder' holds no data/ILSVRC2012_validation_ground_truth\.txt"),
        ("large.tar", r"large\.tar' cannot be read as the devkit \(67108865 bytes are more than 67108864\)"),
        ("nowhere", r"nowhere' cannot be read as the devkit \(.*No such file or directory.*\)"),
    ],
)
def test_another_file_as_devkit(scan, tmp_path, name, message):
    scan()
    other_files(tmp_path)
    with pytest.raises(UserError, match=message + RIGHT):
        list(IlsvrcVal(str(tmp_path / "val.tar"), str(tmp_path / name), WNIDS).scan())


def test_without_scipy(scan, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match=r"read by scipy, which is missing: pip install 'vittm-pipeline\[data\]'"):
        scan(devkit={f"{INSIDE}/{name}": b"" for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")})
