"""Class lists: ImageNet's own, a user's, and what a source lacks of one."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from shards.classes import check_classes, load_classes
from shards.errors import UserError


@pytest.mark.parametrize(
    ("name", "count", "file"),
    [("1k", 1000, "imagenet_synsets.txt"), ("21k-p", 10450, "imagenet21k_miil_w21_synsets.txt")],
)
def test_the_lists_are_timms(name, count, file):
    classes = load_classes(name)
    assert len(set(classes)) == count
    assert list(classes) == sorted(classes)
    assert list(classes) == (Path(find_spec("timm").origin).parent / "data/_info" / file).read_text().split()


def test_nine_classes_of_1k_are_not_in_21k_p():
    assert len(set(load_classes("1k")) - set(load_classes("21k-p"))) == 9


def write(path, data):
    path.write_bytes(data)
    return str(path)


def test_a_file_keeps_its_order(tmp_path):
    text = "\ufeffzebra\r\nsea lion \nÄffin\n"
    assert load_classes(write(tmp_path / "list.txt", text.encode())) == ("zebra", "sea lion", "Äffin")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"the class list '.*list\.txt' is empty; write one class a line"),
        (b"a\n\nb\n", r"line 2 of the class list '.*list\.txt' is empty"),
        (b"a\nb\na\n", r"has 'a' twice, on lines 1 and 3; remove one"),
        (b"\xff\xd8\xff\xe0", r"list\.txt' is not UTF-8 text .* cannot be a class list: one class a line"),
        (b"a" * ((64 << 20) + 1), r"list\.txt' has more than 67108864 bytes and cannot be a class list"),
    ],
)
def test_files_that_are_no_class_lists(tmp_path, data, message):
    with pytest.raises(UserError, match=message):
        load_classes(write(tmp_path / "list.txt", data))


@pytest.mark.parametrize("name", ["2k", "."])
def test_an_unknown_list(name):
    with pytest.raises(UserError, match=rf"there is no class list '{name}'; give 1k or 21k-p, or the path of"):
        load_classes(name)


def test_the_same_classes_in_any_order_pass():
    check_classes(["b", "a", "b"], ("a", "b"), "the source")


def test_missing_and_extra_classes_are_listed():
    expected = tuple(f"c{number:02d}" for number in range(14))
    with pytest.raises(UserError) as error:
        check_classes(["c00", "c01", "x\n\udcff"], expected, "the source")
    assert str(error.value) == (
        "the source has 3 classes and must have 14: 12 missing ('c02', 'c03', 'c04', 'c05', 'c06', 'c07', 'c08', "
        r"'c09', 'c10', 'c11' and 2 more); 1 extra ('x\n\udcff'). Either its download or extraction is incomplete: "
        "finish it; or --classes is not the list of this source: correct it"
    )


def test_only_extra_classes():
    with pytest.raises(UserError, match=r"has 2 classes and must have 1: 1 extra \('b'\)\."):
        check_classes(["a", "b"], ("a",), "the source")
