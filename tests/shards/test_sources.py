"""Class folders: what is a class, a sample, a key, and what is none."""

import os

import pytest

from shards.errors import UserError
from shards.sources import class_folders, listing_sha256


def lay(root, *names, data=b"x"):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def test_classes_and_samples_are_sorted(tmp_path):
    lay(
        tmp_path,
        "b/2.JPG",
        "b/10.png",
        "a/a_1.JPEG",
        "a/1x.webp",
        "a/notes.txt",
        "a/.hidden.jpg",
        ".git/x.jpg",
        "list.csv",
    )
    classes, samples = class_folders(tmp_path)
    assert classes == ("a", "b")
    assert [(one.key, one.label, one.filename) for one in samples] == [
        ("a_1x", 0, "1x.webp"),
        ("a_1", 0, "a_1.JPEG"),
        ("b_10", 1, "10.png"),
        ("b_2", 1, "2.JPG"),
    ]


def test_imagenet_names_are_their_own_keys(tmp_path):
    _, samples = class_folders(lay(tmp_path, "n01440764/n01440764_10026.JPEG"))
    assert samples[0].key == "n01440764_10026"


def test_linked_files_are_read_like_files(tmp_path):
    source = lay(tmp_path / "source", "a/1.jpg", data=b"one")
    (source / "a/2.jpg").symlink_to(lay(tmp_path / "other", "x.jpg", data=b"two") / "x.jpg")
    _, samples = class_folders(source)
    assert [(one.read(), one.num_bytes) for one in samples] == [(b"one", 3), (b"two", 3)]


def test_a_broken_link(tmp_path):
    lay(tmp_path, "a/1.jpg")
    (tmp_path / "a/2.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(UserError, match=r"2\.jpg is not a file but a broken link or a device"):
        class_folders(tmp_path)


def test_a_pipe_is_not_opened(tmp_path):
    lay(tmp_path, "a/1.jpg")
    os.mkfifo(tmp_path / "a/2.jpg")
    with pytest.raises(UserError, match=r"2\.jpg is not a file but a broken link or a device"):
        class_folders(tmp_path)


def test_a_missing_source(tmp_path):
    with pytest.raises(UserError, match=r"source directory .*nowhere does not exist"):
        class_folders(tmp_path / "nowhere")


def test_a_source_without_class_folders(tmp_path):
    with pytest.raises(UserError, match=r"holds no class folders; the layout is .*/<class>/<image>\.jpg"):
        class_folders(lay(tmp_path, "1.jpg"))


def test_a_class_folder_without_images(tmp_path):
    lay(tmp_path, "a/1.jpg", "empty/readme.txt")
    with pytest.raises(UserError, match=r"class folder .*/empty has no images \(\.jpg"):
        class_folders(tmp_path)


def test_a_source_one_level_too_high(tmp_path):
    lay(tmp_path, "train/a/1.jpg", "val/a/1.jpg")
    with pytest.raises(UserError, match=r"class folder .*/train holds folders \(a\).*give .*/train as the source"):
        class_folders(tmp_path)


def test_names_that_cannot_be_keys_are_listed_together(tmp_path):
    long = "x" * 94
    lay(tmp_path, "a/1.2.jpg", f"a/{long}.jpg", "b.c/1.jpg", "ok/1.jpg")
    (tmp_path / "ok" / os.fsdecode(b"\xff.jpg")).write_bytes(b"x")
    with pytest.raises(UserError) as error:
        class_folders(tmp_path)
    text = str(error.value)
    assert text.startswith("4 files have names that cannot be sample keys")
    for part in ("a dot in 'a_1.2'", "96 bytes", "a dot in 'b.c_1'", "not UTF-8", "95 bytes of UTF-8 at most"):
        assert part in text
    text.encode()


def test_a_long_list_is_cut(tmp_path):
    lay(tmp_path, *(f"a/{number}.x.jpg" for number in range(12)))
    with pytest.raises(UserError, match=r"12 files have names.* and 2 more"):
        class_folders(tmp_path)


@pytest.mark.parametrize("names", [("a/1.jpg", "a/1.png"), ("a/1.jpg", "a/a_1.jpg"), ("a/b_c.jpg", "a_b/c.jpg")])
def test_two_files_of_one_key(tmp_path, names):
    with pytest.raises(UserError, match=r"1 files have names.*the key 'a_\w+' is also that of"):
        class_folders(lay(tmp_path, *names))


def test_the_listing_tells_sources_apart_and_not_places(tmp_path):
    first, second = (class_folders(lay(tmp_path / place, "a/1.jpg", "b/2.jpg")) for place in ("x", "y"))
    assert listing_sha256(*first) == listing_sha256(*second)
    grown = class_folders(lay(tmp_path / "y", "b/2.jpg", data=b"longer"))
    assert listing_sha256(*first) != listing_sha256(*grown)
