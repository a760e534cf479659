"""Parquet as the Hugging Face hub holds it: what is an image, its name and its class, and what is no such file."""

import json
import random
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.errors import UserError
from shards.sources.base import Rejected
from shards.sources.parquet import Parquet

WNIDS = ("n01440764", "n01443537", "n02119789")
WORDS = ("tench, Tinca tinca", "goldfish", "kit fox")
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LABEL = pa.int64()


def schema(names=WORDS, image=IMAGE, label=LABEL):
    """As `datasets` writes it: the names of the labels are metadata."""
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    return pa.schema([("image", image), ("label", label)], metadata)


def rows_of(*images):
    """A table of (bytes, path, label)."""
    return {
        "image": [{"bytes": data, "path": path} for data, path, _ in images],
        "label": [label for _, _, label in images],
    }


def hub_rows(numbers):
    """Training images named as on the hub; the bytes tell the number."""
    return rows_of(*((b"image %d" % i, f"{WNIDS[i % 3]}_{i}_{WNIDS[i % 3]}.JPEG", i % 3) for i in numbers))


def write(path, rows, group=4, **fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows, schema(**fields)), path, row_group_size=group)
    return path


def one_file(root, rows, split="train", **fields):
    write(root / f"{split}-00000-of-00001.parquet", rows, **fields)
    return str(root)


def scan(path, classes=None):
    return list(Parquet(str(path), classes).scan())


def fetched(path, entries):
    fetch = Parquet(str(path)).fetcher()
    return [fetch(one.container, one.name, one.offset, one.size) for one in entries]


@pytest.fixture
def hub(tmp_path):
    """data/ as of imagenet-1k: two files of train, one of validation, one of test, whose labels are -1."""
    write(tmp_path / "data/train-00000-of-00002.parquet", hub_rows(range(10)))
    write(tmp_path / "data/train-00001-of-00002.parquet", hub_rows(range(10, 15)))
    val = [(b"val %d" % i, f"ILSVRC2012_val_{i:08d}_{WNIDS[-i % 3]}.JPEG", -i % 3) for i in range(1, 6)]
    write(tmp_path / "data/validation-00000-of-00001.parquet", rows_of(*val))
    test = [(b"test", f"ILSVRC2012_test_{i:08d}.JPEG", -1) for i in range(5)]
    write(tmp_path / "data/test-00000-of-00001.parquet", rows_of(*test))
    (tmp_path / "README.md").write_text("# a dataset card")
    return tmp_path


def test_the_splits_of_the_hub(hub):
    found = scan(hub, WNIDS)
    train = [("train", WNIDS[i % 3], f"{WNIDS[i % 3]}_{i}.JPEG") for i in range(15)]
    val = [("val", WNIDS[-i % 3], f"ILSVRC2012_val_{i:08d}.JPEG") for i in range(1, 6)]
    assert [one[:3] for one in found] == train + val
    assert fetched(hub, found) == [b"image %d" % i for i in range(15)] + [b"val %d" % i for i in range(1, 6)]
    assert [(one.offset, one.size) for one in found[:6]] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (3, 0),
        (1 << 32, 0),
        (1 << 32 | 1, 0),
    ]


def test_files_that_datasets_wrote(tmp_path, image):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(WORDS))})
    images = [(image(number), f"{WNIDS[2 - number % 3]}_{number}.JPEG", 2 - number % 3) for number in range(7)]
    written = datasets.Dataset.from_dict(rows_of(*images), features=features)
    written.to_parquet(str(tmp_path / "train-00000-of-00001.parquet"), batch_size=3)
    found = scan(tmp_path)
    assert [(one.class_name, one.name) for one in found] == [(WORDS[label], name) for _, name, label in images]
    assert [one.class_name for one in scan(tmp_path, WNIDS)] == [WNIDS[label] for _, _, label in images]
    assert fetched(tmp_path, found) == [data for data, _, _ in images]
    assert found[-1].offset >> 32 == 2


def test_images_in_any_order(hub):
    found = scan(hub, WNIDS)
    expected = dict(zip(found, fetched(hub, found), strict=True))
    random.Random(0).shuffle(found)
    assert fetched(hub, found) == [expected[one] for one in found]


def test_the_folder_itself(hub, monkeypatch):
    assert scan(hub / "data") == scan(hub)
    monkeypatch.chdir(hub / "data")
    assert scan(".") == scan(hub)


@pytest.mark.parametrize(
    ("names", "classes", "expected"),
    [
        (WORDS, None, WORDS),
        (None, None, ("00000", "00001", "00002")),
        (None, WNIDS, WNIDS),
        (WNIDS[::-1], WNIDS, WNIDS[::-1]),  # the files know better in which order their labels are
    ],
)
def test_the_names_of_labels(tmp_path, names, classes, expected):
    source = one_file(tmp_path, rows_of(*((b"x", f"{i}.jpg", i) for i in range(3))), names=names)
    assert [one.class_name for one in scan(source, classes)] == list(expected)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("n01440764_10026_n01440764.JPEG", "n01440764_10026.JPEG"),
        ("train/n01440764/n01440764_10026.JPEG", "n01440764_10026.JPEG"),
        ("../../cat_n01443537.png", "cat_n01443537.png"),
        ("n01443537_1_n01440764.jpg", "n01443537_1_n01440764.jpg"),
        (b"\xff.jpg", "\udcff.jpg"),
        ("folder/", "train_00000000.jpg"),
        (None, "train_00000000.jpg"),
    ],
)
def test_the_names_of_images(tmp_path, path, name):
    binary = pa.struct([("bytes", pa.binary()), ("path", pa.binary())])
    rows = pa.array([{"bytes": b"x", "path": path}], binary)
    text = pa.StructArray.from_arrays([rows.field("bytes"), rows.field("path").view(pa.string())], fields=list(IMAGE))
    source = one_file(tmp_path, {"image": text, "label": [0]})
    assert [one.name for one in scan(source, WNIDS)] == [name]


def test_images_without_a_name_are_numbered_over_all_files(tmp_path):
    for file in range(2):
        write(tmp_path / f"train-0000{file}-of-00002.parquet", rows_of(*[(b"x", None, 0)] * 3))
    assert [one.name for one in scan(tmp_path)] == [f"train_{i:08d}.jpg" for i in range(6)]


def test_an_image_without_a_label_is_rejected(tmp_path):
    source = one_file(tmp_path, rows_of((b"x", "a.jpg", 0), (b"x", "b.jpg", -1), (b"x", "c.jpg", None)))
    path = f"'{tmp_path}/train-00000-of-00001.parquet'"
    assert scan(source)[1:] == [
        Rejected("train", f"row 1 of {path}", "it has no label (-1)"),
        Rejected("train", f"row 2 of {path}", "it has no label (None)"),
    ]


def test_an_image_without_bytes(tmp_path):
    source = one_file(tmp_path, {"image": [{"bytes": None, "path": "a.jpg"}, None], "label": [0, 0]})
    for entry in scan(source):
        with pytest.raises(ValueError, match="the parquet file has no bytes of it, at most a path"):
            fetched(source, [entry])


def test_labels_that_are_not_in_the_order_of_the_classes(hub):
    with pytest.raises(UserError) as error:
        scan(hub, tuple(reversed(WNIDS)))
    assert str(error.value) == (
        f"row 0 of '{hub}/data/train-00000-of-00002.parquet' is named n01440764_0_n01440764.JPEG, of class n01440764, "
        "and its label stands for n02119789: the labels are not positions in this class list; give --classes a file "
        "with the classes in the order of the labels"
    )


@pytest.mark.parametrize(
    ("names", "label", "classes", "message"),
    [
        (None, 3, WNIDS, r"row 0 of '.*' has label 3, but there are 3 classes; give --classes with all names"),
        (WORDS, 3, None, r"row 0 of '.*' has label 3, but there are 3 classes"),
        (None, 100_000, None, r"row 0 of '.*' has label 100000, but there are 100000 classes"),
        (WORDS, 0, WNIDS[:2], r"train-00000-of-00001\.parquet' has 3 classes and must have 2: 2 missing"),
        (("n02", *WNIDS[:2]), 0, WNIDS, None),
        (("n00000002", *WNIDS[:2]), 0, WNIDS, r"1 missing \('n02119789'\); 1 extra \('n00000002'\)"),
        (
            ("a", "a"),
            0,
            None,
            r"the label names in the 'huggingface' metadata of '.*' are malformed",
        ),
    ],
)
def test_labels_and_classes_that_do_not_fit(tmp_path, names, label, classes, message):
    source = one_file(tmp_path, rows_of((b"x", "a.jpg", label)), names=names)
    if message is None:
        assert [one.class_name for one in scan(source, classes)] == [classes[label]]
        return
    with pytest.raises(UserError, match=message):
        scan(source, classes)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"info": 3}', '{"info": {"features": {"label": {"names": [1, 2]}}}}', "[" * 100_000],
)
def test_malformed_metadata(tmp_path, text):
    table = pa.table(rows_of((b"x", "a.jpg", 0)), schema(None).with_metadata({"huggingface": text}))
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"the label names in the 'huggingface' metadata of '.*' are malformed"):
        scan(tmp_path)


def test_files_of_two_data_sets(tmp_path):
    for file, names in enumerate((WORDS, WNIDS)):
        write(tmp_path / f"train-0000{file}-of-00002.parquet", hub_rows(range(3)), names=names)
    with pytest.raises(UserError, match=r"00-of-00002\.parquet' and '.*01-of-00002\.parquet' name their labels diff"):
        scan(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"holds files <split>-<5 digits>-of-<5 digits>\.parquet, as the Hugging Face hub names them"),
        (["train.parquet"], r"neither '.*' nor its folder data holds files"),
        (
            [f"validation-{i:05d}-of-00014.parquet" for i in (0, 13)],
            r"12 of the 14 files of split 'val' are missing: 'validation-00001-of-00014\.parquet', .* and 2 more",
        ),
        (["train-00001-of-00001.parquet"], r"the files of split 'train' are not of one set \('train-00001-of-00001"),
        (["train-00000-of-00001.parquet", "train-00000-of-00002.parquet"], r"of split 'train' are not of one set"),
        (["train-00000-of-00001-0a1b.parquet", "train-00000-of-00001.parquet"], r"'train' are not of one set"),
        (["validation-00000-of-00001.parquet", "val-00000-of-00001.parquet"], r"split 'val' are not of one set"),
    ],
)
def test_a_set_of_files_that_is_not_whole(tmp_path, names, message):
    for name in names:
        write(tmp_path / name, hub_rows(range(3)))
    with pytest.raises(UserError, match=message):
        scan(tmp_path)


def test_a_data_set_without_labels(tmp_path):
    with pytest.raises(UserError, match=r"no split in '.*' has labels; give a data set that has some"):
        scan(one_file(tmp_path, rows_of((b"x", "a.jpg", -1)), "test"))


@pytest.mark.parametrize(
    "columns",
    [
        {"img": [b"x"], "label": [0]},
        {"image": [b"x"], "label": [0]},
        {"image": pa.array([{"bytes": b"x", "path": "a"}], IMAGE), "label": ["cat"]},
        {"image": pa.array([{"bytes": b"x", "path": "a"}], IMAGE)},
    ],
)
def test_other_columns(tmp_path, columns):
    pq.write_table(pa.table(columns), tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"must have the columns image: struct<bytes: binary, path: string> and label"):
        scan(tmp_path)


def test_large_strings_and_small_labels_are_fine(tmp_path):
    image = pa.struct([("path", pa.large_string()), ("bytes", pa.large_binary())])
    source = one_file(tmp_path, hub_rows(range(3)), image=image, label=pa.uint16())
    found = scan(source, WNIDS)
    assert [one.name for one in found] == [f"{wnid}_{i}.JPEG" for i, wnid in enumerate(WNIDS)]
    assert fetched(source, found) == [b"image 0", b"image 1", b"image 2"]


@pytest.mark.parametrize("keep", [0, 3, 500, -1])
def test_a_file_that_is_cut_short(hub, keep):
    path = hub / "data/train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"train-00001-of-00002\.parquet' is no parquet file, or a damaged one"):
        scan(hub, WNIDS)


def column_place(path, name):
    metadata = pq.read_metadata(path).row_group(0)
    column = next(one for one in map(metadata.column, range(metadata.num_columns)) if one.path_in_schema == name)
    return column.dictionary_page_offset or column.data_page_offset


def damage(path, name):
    """Overwrites the beginning of a column of the first row group."""
    data = bytearray(path.read_bytes())
    start = column_place(path, name)
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)


def test_damaged_labels(hub):
    damage(hub / "data/train-00000-of-00002.parquet", "label")
    with pytest.raises(UserError, match=r"train-00000-of-00002\.parquet' is no parquet file, or a damaged one"):
        scan(hub, WNIDS)


def test_damaged_images(hub):
    damage(hub / "data/train-00000-of-00002.parquet", "image.bytes")
    found = scan(hub, WNIDS)
    for entry in found[:4]:
        with pytest.raises((OSError, ValueError)):
            fetched(hub, [entry])
    assert fetched(hub, found[4:5]) == [b"image 4"]


def test_a_file_that_changes_under_the_reader(hub):
    found = scan(hub, WNIDS)
    write(hub / "data/train-00000-of-00002.parquet", hub_rows(range(2)))
    for entry in found[2], found[5]:
        with pytest.raises(ValueError, match=r"the parquet file has no row [12] of row group [01] any more"):
            fetched(hub, [entry])


def write_zeros(path, groups, images):
    """A file of `groups` row groups of `images` images of 40 MiB, which share their memory and pack well."""
    one = pa.table(rows_of((bytes(40 << 20), "a.jpg", 0)), schema())
    with pq.ParquetWriter(path, one.schema, compression="zstd", use_dictionary=False, write_statistics=False) as writer:
        for _ in range(groups):
            writer.write_table(pa.concat_tables([one] * images))


def test_a_huge_row_group_and_its_remedy(tmp_path):
    path, new = (tmp_path / name / "train-00000-of-00001.parquet" for name in ("old", "new"))
    path.parent.mkdir()
    new.parent.mkdir()
    write_zeros(path, groups=1, images=7)
    with pytest.raises(UserError, match=r"row group 0 of '.*' has \d+ bytes of images .* 268435456") as error:
        scan(path.parent)
    code = str(error.value).partition("python -c '")[2].partition("' OLD NEW")[0]
    write(path, hub_rows(range(250)), group=250)
    subprocess.run([sys.executable, "-c", code, path, new], check=True)
    found = scan(new.parent, WNIDS)
    assert [one.offset for one in found[::100]] == [0, 1 << 32, 2 << 32]
    assert fetched(new.parent, found) == [b"image %d" % i for i in range(250)]


def test_a_small_file_that_unpacks_to_much(tmp_path):
    """One value of 50 MiB, repeated by a dictionary."""
    path = tmp_path / "train-00000-of-00001.parquet"
    data = pa.DictionaryArray.from_arrays(pa.array([0] * 6), pa.array([bytes(50 << 20)]))
    image = pa.StructArray.from_arrays([data, pa.array(["a.jpg"] * 6)], ["bytes", "path"])
    table = pa.table({"image": image, "label": [0] * 6})
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="row group 0 unpacks to more than 268435456 bytes"):
        fetched(tmp_path, scan(tmp_path)[:1])


def test_row_groups_are_kept_within_bounds(tmp_path):
    """Of 18 row groups of 40 MiB, 720 MiB in all, only the last are in memory."""
    write_zeros(tmp_path / "train-00000-of-00001.parquet", groups=18, images=1)
    code = (
        "import re, sys; from pathlib import Path; from shards.sources.parquet import Parquet; "
        "source = Parquet(sys.argv[1]); fetch = source.fetcher(); "
        "print({len(fetch(one.container, one.name, one.offset, 0)) for one in source.scan()}); "
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    sizes, peak = done.stdout.splitlines()
    assert sizes == str({40 << 20})
    assert int(peak) < 600 << 10


def test_without_pyarrow(tmp_path, monkeypatch):
    source = one_file(tmp_path, hub_rows(range(3)))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"read by pyarrow, which is missing: pip install 'vittm-pipeline\[data\]'"):
        scan(source)
