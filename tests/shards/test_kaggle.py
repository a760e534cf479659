"""Kaggle's layout of ImageNet-1k: train in class folders, val flat with its labels in a table beside."""

import pytest

from shards.errors import UserError
from shards.sources.base import Entry, Rejected
from shards.sources.kaggle import Kaggle

WNIDS = ("n01440764", "n01443537")
TRAIN = [("n01440764", "n01440764_10026.JPEG"), ("n01443537", "n01443537_2.JPEG")]
VAL = {1: "n01443537", 2: "n01440764", 3: "n01443537"}


def label_lines(labels):
    return [
        "ImageId,PredictionString",
        *(f"ILSVRC2012_val_{i:08d},{wnid} 85 1 499 272 n09999999 1 2 3 4 " for i, wnid in labels.items()),
    ]


@pytest.fixture
def source(tmp_path):
    images = tmp_path / "ILSVRC/Data/CLS-LOC"
    for wnid, name in TRAIN:
        (images / "train" / wnid).mkdir(parents=True)
        (images / "train" / wnid / name).write_bytes(wnid.encode())
    for folder in ("val", "test"):
        (images / folder).mkdir()
    for number in VAL:
        (images / f"val/ILSVRC2012_val_{number:08d}.JPEG").write_bytes(b"%d" % number)
    (images / "test/ILSVRC2012_test_00000001.JPEG").write_bytes(b"unlabelled")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(label_lines(VAL)) + "\n")
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    return tmp_path


def scan(root, classes=WNIDS):
    return sorted(Kaggle(str(root), classes).scan())


def test_both_splits(source):
    found, fetch = scan(source), Kaggle(str(source), WNIDS).fetcher()
    train = [("train", wnid, name, wnid.encode()) for wnid, name in TRAIN]
    val = [("val", wnid, f"ILSVRC2012_val_{number:08d}.JPEG", b"%d" % number) for number, wnid in VAL.items()]
    images = [(*one[:3], fetch(one.container, one.name, one.offset, one.size)) for one in found]
    assert images == sorted(train + val)
    assert {one.size for one in found} == {9, 1}


@pytest.mark.parametrize("inside", ["ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_any_folder_down_to_the_images(source, inside, monkeypatch):
    assert scan(source / inside) == scan(source)
    monkeypatch.chdir(source / inside)
    assert scan(".") == scan(source)


@pytest.mark.parametrize(("gone", "left"), [("train", "val"), ("val", "train")])
def test_one_split_alone(source, gone, left):
    (source / "ILSVRC/Data/CLS-LOC" / gone).rename(source / "elsewhere")
    assert {one.split for one in scan(source)} == {left}


def test_the_mapping_may_be_missing(source):
    (source / "LOC_synset_mapping.txt").unlink()
    assert len(scan(source)) == 5


def test_another_folder(tmp_path):
    with pytest.raises(UserError, match=r"holds neither ILSVRC/Data/CLS-LOC/train nor .*; extract Kaggle's archive"):
        scan(tmp_path)


def test_val_without_labels(source):
    (source / "LOC_val_solution.csv").unlink()
    with pytest.raises(UserError, match=rf"there is no '{source}/LOC_val_solution\.csv'; put Kaggle's LOC_val"):
        scan(source)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"does not begin with the line ImageId,PredictionString"),
        (["id,label", "1,n01440764"], r"LOC_val_solution\.csv' does not begin with the line ImageId,PredictionString"),
        (
            [*label_lines(VAL), "ILSVRC2012_val_00000004"],
            r"line 5 .*val_00000004', is no IMAGE,WNID \.\.\.",
        ),
        ([*label_lines(VAL), "ILSVRC2012_val_00000004, "], r"line 5 .* is no IMAGE,WNID \.\.\.; download it again"),
        (label_lines(VAL) + label_lines({2: "n01440764"})[1:], r"line 5 .* names an image a second time"),
        (
            label_lines({1: "n01443537", 2: "n01440764", 3: "n02"}),
            r"csv' has 3 classes .* 1 extra \('n02'\)",
        ),
    ],
)
def test_a_wrong_table_of_labels(source, lines, message):
    (source / "LOC_val_solution.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        scan(source)


def test_an_image_without_a_label_is_rejected(source):
    path = source / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000009.JPEG"
    path.write_bytes(b"9")
    found = scan(source)
    assert Rejected("val", ascii(str(path)), "LOC_val_solution.csv has no row for it") in found
    assert sum(isinstance(one, Entry) for one in found) == 5


def test_labels_without_an_image(source):
    (source / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000002.JPEG").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the 3 images of .*\('ILSVRC2012_val_00000002'\); the download or"):
        scan(source)


def test_other_classes_than_those_of_the_mapping(source):
    with pytest.raises(UserError, match=r"LOC_synset_mapping\.txt' has 2 classes and must have 3: 1 missing \('n02'\)"):
        scan(source, (*WNIDS, "n02"))


def test_a_class_of_train_that_is_missing(source):
    (source / "ILSVRC/Data/CLS-LOC/train/n01443537").rename(source / "elsewhere")
    with pytest.raises(UserError, match=r"CLS-LOC/train' has 1 classes and must have 2: 1 missing \('n01443537'\)"):
        scan(source)
