"""ImageNet-21k: the raw archive, and the one of ImageNet-21k-P in its three forms."""

import gzip
import io
import tarfile

import pytest

from shards.errors import UserError
from shards.sources.base import PRule, Rejected
from shards.sources.imagenet21k import Resized21k, Winter21


def tar_of(files):
    """A tar of a {name: bytes}; None makes a symbolic link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data or b""), tarfile.REGTYPE if data is not None else tarfile.SYMTYPE
            tar.addfile(info, io.BytesIO(data or b""))
    return buffer.getvalue()


def found(source):
    """{(split, class, name): bytes}, and the reasons why others are none."""
    fetch, images, reasons = source.fetcher(), {}, []
    for one in source.scan():
        if isinstance(one, Rejected):
            reasons.append((one.split, one.reason))
        else:
            images[one.split, one.class_name, one.name] = fetch(one.container, one.name, one.offset, one.size)
    return images, reasons


@pytest.mark.parametrize("compressed", [True, False])
def test_the_raw_archive(tmp_path, compressed):
    data = tar_of(
        {
            "n01.tar": tar_of({"n01_2.JPEG": b"two", "n01_10.JPEG": b"ten", "n01_3.jpg": b"x", "n01_4.jpeg": b"x"}),
            "n02.tar": tar_of({"n02_1.JPEG": b"one", "n02_2.JPEG.txt": b"x", "n02_3.JPEG": None, "n02_4.png": b"x"}),
        }
    )
    path = tmp_path / "winter21_whole.tar.gz"
    path.write_bytes(gzip.compress(data) if compressed else data)
    source = Winter21(str(path), ("n01",))
    images = {("train", "n01", "n01_2.JPEG"): b"two", ("train", "n01", "n01_10.JPEG"): b"ten"}
    assert found(source) == ({**images, ("train", "n02", "n02_1.JPEG"): b"one"}, [("train", "a link")])
    assert (source.in_order, source.classes, source.p_rule) == (compressed, ("n01",), PRule(501, 50))


RESIZED = {
    "imagenet21k_train/n01/n01_1.JPEG": b"one",
    "imagenet21k_train/n02/n02_1.JPEG": b"two",
    "imagenet21k_val/n01/n01_9.JPEG": b"three",
    "imagenet21k_small_classes/n03/n03_1.JPEG": b"small",
    "imagenet21k_small_classes/n03/deep/er/n03_1.JPEG": b"small",
    "other/n04.JPEG": b"other",
}
IMAGES = {
    ("train", "n01", "n01_1.JPEG"): b"one",
    ("train", "n02", "n02_1.JPEG"): b"two",
    ("val", "n01", "n01_9.JPEG"): b"three",
}


@pytest.fixture(params=["tar.gz", "tar", "directory"])
def resized(request, tmp_path):
    """Makes the archive or the directory of a {name: bytes}."""

    def make(files):
        path = tmp_path / "resized"
        if request.param == "directory":
            for name, data in files.items():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(data)
        else:
            data = tar_of(files)
            path.write_bytes(gzip.compress(data) if request.param == "tar.gz" else data)
        return Resized21k(str(path), ("n01", "n02"))

    make.in_order = request.param == "tar.gz"
    return make


@pytest.mark.parametrize("above", ["", "./", "imagenet21k_resized/"])
def test_the_resized_images(resized, above):
    source = resized({above + name: data for name, data in RESIZED.items()})
    assert found(source) == (IMAGES, [])
    assert (source.in_order, source.classes, source.p_rule) == (resized.in_order, ("n01", "n02"), None)


def test_resized_images_of_one_split(resized):
    images, _ = found(resized({"imagenet21k_val/n01/n01_9.JPEG": b"three"}))
    assert list(images) == [("val", "n01", "n01_9.JPEG")]


def test_neither_split_is_there(resized):
    source = resized({"train/n01/1.JPEG": b"x", "imagenet21k_small_classes/n03/1.JPEG": b"x"})
    message = (
        "neither of the folders imagenet21k_train and imagenet21k_val, but 'imagenet21k_small_classes', 'train'; give"
    )
    with pytest.raises(UserError, match=message):
        list(source.scan())


def test_an_archive_without_images(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of({"readme.txt": b"x"}))
    with pytest.raises(UserError, match=r"a\.tar' has neither of the folders .*, but nothing; give"):
        list(Resized21k(str(tmp_path / "a.tar")).scan())


@pytest.mark.parametrize(
    ("name", "split", "reason"),
    [
        ("imagenet21k_train/n01_2.JPEG", "train", "it does not lie in a class folder"),
        ("top/imagenet21k_val/n01_2.JPEG", "val", "it does not lie in a class folder"),
        ("imagenet21k_train/n01/deep/n01_2.JPEG", "train", "it does not lie in a class folder"),
        ("imagenet21k_train/../n01/n01_2.JPEG", "train", "'..' in its path"),
        ("/imagenet21k_val/n01/n01_2.JPEG", "val", "an absolute path"),
    ],
)
def test_what_is_refused_in_an_archive_and_why(tmp_path, name, split, reason):
    links = {"imagenet21k_val/n01/n01_3.JPEG": None, "imagenet21k_small_classes/n03/n03_2.JPEG": None}
    (tmp_path / "a.tar").write_bytes(tar_of({**RESIZED, name: b"x", **links}))
    assert found(Resized21k(str(tmp_path / "a.tar"))) == (IMAGES, [(split, reason), ("val", "a link")])


def test_folders_below_a_class_folder(tmp_path):
    (tmp_path / "imagenet21k_train" / "n01" / "deep").mkdir(parents=True)
    with pytest.raises(UserError, match=r"n01' holds folders \('deep'\)"):
        list(Resized21k(str(tmp_path)).scan())
