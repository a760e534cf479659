"""Class folders: what is a class, an image, and what is none."""

import os

import pytest

from shards.errors import UserError
from shards.sources.base import WHOLE_FILE, Entry, Rejected
from shards.sources.folders import ClassFolders


def lay(root, *names, data=b"x"):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def scan(root, classes=None):
    return sorted(ClassFolders(str(root), "train", classes).scan())


def rejected(root):
    """Reasons by file name, beside the good image that each of these sources holds."""
    found = scan(root)
    assert [one.name for one in found if isinstance(one, Entry)] == ["1.jpg"]
    return {os.path.basename(one.where.strip("'")): one.reason for one in found if isinstance(one, Rejected)}


def test_images_of_class_folders(tmp_path):
    lay(tmp_path, "b/2.JPG", "b/10.png", "a/a_1.JPEG", "a/1x.webp", data=b"four")
    lay(tmp_path, "a/notes.txt", "a/.hidden.jpg", "a/.thumbnails/x.jpg", ".git/x.jpg", "list.csv", "1.jpg")
    assert scan(tmp_path) == [
        Entry("train", name, file, str(tmp_path / name), WHOLE_FILE, 4)
        for name, file in [("a", "1x.webp"), ("a", "a_1.JPEG"), ("b", "10.png"), ("b", "2.JPG")]
    ]


def test_a_source_is_found_from_elsewhere(tmp_path, monkeypatch):
    lay(tmp_path, "source/a/1.jpg")
    monkeypatch.chdir(tmp_path)
    assert [entry.container for entry in scan("source")] == [str(tmp_path / "source/a")]


def test_linked_files_are_read_like_files(tmp_path):
    source = lay(tmp_path / "source", "a/1.jpg", data=b"one")
    (source / "a/2.jpg").symlink_to(lay(tmp_path / "other", "x.jpg", data=b"three") / "x.jpg")
    (source / "b").symlink_to(lay(tmp_path / "elsewhere", "3.jpg", data=b"3"))
    fetch = ClassFolders(str(source), "train").fetcher()
    assert [(entry.size, fetch(*entry[3:4], *entry[2:3], *entry[4:])) for entry in scan(source)] == [
        (3, b"one"),
        (5, b"three"),
        (1, b"3"),
    ]


def test_what_is_no_regular_file_is_rejected_unopened(tmp_path):
    lay(tmp_path, "a/1.jpg", "a/folder.jpg/x.txt")
    (tmp_path / "a/gone.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "a/loop.jpg").symlink_to(tmp_path / "a/loop.jpg")
    (tmp_path / "a/loop").symlink_to(tmp_path / "a/loop")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "a/pipe.jpg")
    assert rejected(tmp_path) == {
        "folder.jpg": "a directory",
        "gone.jpg": "a broken link (No such file or directory)",
        "loop.jpg": "a broken link (Too many levels of symbolic links)",
        "pipe.jpg": "no regular file but a device, a pipe or a socket",
    }


def test_names_that_are_no_text_stay_printable(tmp_path):
    lay(tmp_path, "a/1.jpg")
    name = os.fsdecode(b"\xff\n.jpg")
    (tmp_path / "a" / name).symlink_to(tmp_path / "gone")
    assert list(rejected(tmp_path)) == [r"\udcff\n.jpg"]


def test_a_name_that_is_no_utf_8_is_read(tmp_path):
    name = os.fsdecode(b"\xff.jpg")
    entry = scan(lay(tmp_path, f"a/{name}", data=b"bytes"))[0]
    fetch = ClassFolders(str(tmp_path), "train").fetcher()
    assert fetch(entry.container, entry.name, entry.offset, entry.size) == b"bytes"


def test_a_missing_source(tmp_path):
    with pytest.raises(UserError, match=r"the source directory '.*/nowhere' does not exist; give one that holds"):
        scan(tmp_path / "nowhere")


def test_a_source_without_class_folders(tmp_path):
    with pytest.raises(UserError, match=r"holds no class folders; the layout is PATH/<class>/<image>\.jpg"):
        scan(lay(tmp_path, "1.jpg"))


def test_a_class_folder_without_images(tmp_path):
    with pytest.raises(UserError, match=r"class folder '.*/empty' has no images \(\.jpg, .*remove the folder"):
        scan(lay(tmp_path, "a/1.jpg", "empty/readme.txt"))


def test_a_source_one_level_too_high(tmp_path):
    lay(tmp_path, "train/b/1.jpg", "train/a/1.jpg")
    with pytest.raises(UserError, match=r"'.*/train' holds folders \('a', 'b'\).* if 'a' is a class, give '.*/train'"):
        scan(tmp_path)


def test_the_classes_that_must_be_there(tmp_path):
    lay(tmp_path, "a/1.jpg", "b/1.jpg")
    assert len(scan(tmp_path, ("b", "a"))) == 2
    with pytest.raises(UserError, match=r"2 classes and must have 2: 1 missing \('c'\); 1 extra \('a'\)"):
        scan(tmp_path, ("b", "c"))
