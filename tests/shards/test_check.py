"""A check finds every way in which shards can differ from their index, and nothing in shards that do not."""

import hashlib
import json
import shutil
import tarfile

import numpy as np
import pytest

from shards.checking.check import CheckOptions, check_directory
from shards.checking.duplicates import ROW, Spill
from shards.checking.findings import ACROSS, IN_OTHER, OTHER_CLASS, WITHIN
from shards.checking.shard import MAX_LISTED
from shards.engine import open_engine
from shards.errors import UserError
from shards.index import Index
from shards.tars import ustar
from shards.tars.in_place import ForeignOptions, index_in_place

SHARD = "train-000001.tar"
IMAGES = (".jpg", ".png", ".webp")


def check(root, workers=1, **options):
    with open_engine("local", workers) as engine:
        return check_directory(root, CheckOptions(**options), engine)


def only(report):
    """The one finding of a report."""
    (finding,) = report.findings
    assert report.counts == {finding.check: 1}
    return finding


def members(path):
    with tarfile.open(path) as tar:
        return [(item.name, tar.extractfile(item).read()) for item in tar]


def tar_of(items):
    return b"".join(ustar.member(name, data) for name, data in items) + ustar.END


def edit(root, change):
    """Changes the manifest's entry of train."""
    manifest = json.loads((root / "index.json").read_bytes())
    change(manifest["splits"]["train"])
    (root / "index.json").write_text(json.dumps(manifest))


def publish(root, shard, content, rows=None):
    """Writes a shard and, with the `rows` of its images, makes the index that of a split with this shard alone."""
    (root / shard).write_bytes(content)
    entry = {"name": shard, "num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if rows is None:
        edit(root, lambda train: next(item for item in train["shards"] if item["name"] == shard).update(entry))
        return
    np.save(root / "train.offsets.npy", rows)
    sha256 = hashlib.sha256((root / "train.offsets.npy").read_bytes()).hexdigest()
    shards = [{**entry, "num_samples": len(rows)}]
    edit(root, lambda train: train.update(shards=shards, offsets_sha256=sha256))


@pytest.fixture
def one(source, written, tmp_path):
    """A directory with one shard, and the members of it."""
    index = written(source, tmp_path / "out", shard_size=100)
    return index.root, members(index.root / "train-000000.tar")


def reshape(root, items):
    """Makes `items` the only shard, under an index that agrees with it in all that an index says."""
    rows, offset = [], 0
    by_key = {name.split(".")[0]: data for name, data in items if name.endswith(".cls")}
    for name, data in items:
        label = by_key.get(name.split(".")[0], b"0")
        if name.endswith(IMAGES):
            rows.append((offset + ustar.BLOCK, len(data), int(label) if label.isdigit() and int(label) < 3 else -1))
        offset += len(ustar.member(name, data))
    publish(root, "train-000000.tar", tar_of(items), np.array(rows, Index.load(root).offsets("train").dtype))


# --- whole shards


@pytest.mark.parametrize("decode", [0, 5, None])
def test_whole_shards(index, decode):
    report = check(index.root, decode=decode)
    assert (report.num_errors, report.num_warnings, report.findings, report.counts) == (0, 0, (), {})
    counts = report.splits["train"]
    assert (counts.shards, counts.images, counts.bytes) == (5, 21, index.split("train").num_bytes)
    assert counts.decoded == (21 if decode is None else decode)
    assert (counts.fewest_images_a_class, counts.median_images_a_class, counts.most_images_a_class) == (7, 7.0, 7)
    assert counts.classes_without_images == 0


def test_a_report_is_the_same_for_any_number_of_processes(index):
    (index.root / SHARD).write_bytes(b"x" * 5000)
    (index.root / "train-000003.tar").unlink()
    one, two = check(index.root), check(index.root, workers=2)
    assert one.to_json() == two.to_json()
    report = json.loads(one.to_json())
    assert report["errors"] == 3
    assert [(item["level"], item["check"], item["shard"]) for item in report["findings"]] == [
        ("error", "tar", SHARD),
        ("error", "size", SHARD),
        ("error", "missing", "train-000003.tar"),
    ]


def test_only_the_splits_asked_for(index, source, written):
    written(source, index.root, "val")
    (index.root / "val-000000.tar").unlink()
    assert check(index.root, splits=("train",), decode=0).num_errors == 0
    assert only(check(index.root, splits=("val",), decode=0)).shard == "val-000000.tar"
    assert list(check(index.root).splits) == ["train", "val"]


# --- damaged files


def test_a_flipped_bit_in_padding(index):
    data = bytearray((index.root / SHARD).read_bytes())
    data[-1] ^= 1
    (index.root / SHARD).write_bytes(data)
    checks = [(item.check, item.shard, item.key) for item in check(index.root).findings]
    assert ("hash", SHARD, "") in checks
    assert {shard for _, shard, _ in checks} == {SHARD}


def test_a_flipped_bit_in_an_image(index):
    row = index.offsets("train")[7]
    data = bytearray((index.root / SHARD).read_bytes())
    data[int(row["offset"]) + int(row["size"]) // 2] ^= 1
    (index.root / SHARD).write_bytes(data)
    finding = only(check(index.root, decode=0))
    assert (finding.check, finding.shard, finding.key) == ("hash", SHARD, "")
    assert finding.reason.startswith(f"its SHA-256 is {hashlib.sha256(data).hexdigest()}, and the index says ")


def test_a_flipped_bit_in_a_header(index):
    row = index.offsets("train")[7]
    data = bytearray((index.root / SHARD).read_bytes())
    data[int(row["offset"]) - ustar.BLOCK] ^= 1
    (index.root / SHARD).write_bytes(data)
    report = check(index.root)
    assert report.counts == {"tar": 1, "hash": 1}
    assert "checksum" in report.findings[0].reason
    assert "(1 images before that were checked)" in report.findings[0].reason


def test_a_truncated_shard(index):
    data = (index.root / SHARD).read_bytes()
    (index.root / SHARD).write_bytes(data[: len(data) // 2])
    report = check(index.root)
    assert report.counts == {"tar": 1, "size": 1}
    assert report.findings[1].reason == f"it has {len(data) // 2} bytes, and the index says {len(data)}"


def test_a_shard_that_is_a_directory(index):
    (index.root / SHARD).unlink()
    (index.root / SHARD).mkdir()
    finding = only(check(index.root))
    assert (finding.check, finding.reason) == ("tar", "it cannot be read (Is a directory)")


def test_stray_files(index):
    for name in ("other-000000.tar", "train-000009.tar.idx", "train-000001.tar.7.tmp", "val.offsets.npy"):
        (index.root / name).touch()
    (index.root / "val.unfinished").mkdir()
    (index.root / "notes.txt").touch()
    report = check(index.root)
    assert {item.shard: item.reason.split(";")[0] for item in report.findings} == {
        "other-000000.tar": "the index does not name it",
        "train-000009.tar.idx": "the index does not name it",
        "train-000001.tar.7.tmp": "a killed or running make_shards left it",
        "val.offsets.npy": "the index has no such split",
        "val.unfinished": "a killed or running make_shards left it",
    }
    assert report.counts == {"stray": 5}


# --- an index that disagrees


def test_swapped_labels_in_the_offsets(index):
    rows = np.array(index.offsets("train"))
    first, second = np.unique(rows["label"], return_index=True)[1][:2]
    rows["label"][[first, second]] = rows["label"][[second, first]]
    np.save(index.root / "train.offsets.npy", rows)
    report = check(index.root)
    assert report.counts == {"offsets": 1, "index": 2}
    assert report.findings[0].reason == "it has not the SHA-256 that the index says; --repair-index"
    offset, size, label = rows[first].item()
    reasons = [item.reason for item in report.findings]
    assert f"the index has (offset, size, label) {(offset, size, label)}, and the tar {(offset, size, 0)}" in reasons


def test_offsets_in_another_order(one):
    root, items = one
    rows = np.array(Index.load(root).offsets("train"))
    publish(root, "train-000000.tar", tar_of(items), np.concatenate([rows[1:2], rows[:1], rows[2:]]))
    finding = only(check(root))
    assert (finding.check, finding.reason) == (
        "index",
        "in the index, other samples come before it than in the tar",
    )


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_offsets_that_cannot_be_read(index, content):
    path = index.root / "train.offsets.npy"
    path.unlink() if content is None else path.write_bytes(content)
    report = check(index.root, decode=None)
    finding = only(report)
    assert (finding.check, finding.shard) == ("offsets", "train.offsets.npy")
    assert "cannot read the offsets" in finding.reason
    assert report.splits["train"].decoded == 21


def test_counts_that_are_wrong_without_offsets(one):
    root, items = one
    publish(root, "train-000000.tar", tar_of(items[:-3]))
    (root / "train.offsets.npy").unlink()
    report = check(root)
    assert report.counts == {"offsets": 1, "index": 1}
    assert report.findings[1].reason == "it holds 20 images, and the index counts 21"


def test_samples_taken_out_of_a_shard(one):
    root, items = one
    publish(root, "train-000000.tar", tar_of(items[:-3]))
    last = Index.load(root).offsets("train")["offset"][-1]
    assert only(check(root)).reason == f"the index has 1 images that were not found, the first at byte {last}"
    publish(root, "train-000000.tar", tar_of(items[:30] + items[33:]))
    report = check(root)
    assert set(report.counts) == {"index"}
    assert report.counts["index"] > 1


def test_many_findings_are_counted_and_the_first_listed(source, written, folders, tmp_path):
    index = written(folders(tmp_path / "many", 2, 70), tmp_path / "out", shard_size=200)
    rows = np.array(index.offsets("train"))
    rows["size"] += 1
    np.save(index.root / "train.offsets.npy", rows)
    report = check(index.root, decode=0)
    assert report.counts["index"] == 140
    assert sum(item.check == "index" for item in report.findings) == MAX_LISTED
    assert report.num_errors == 141


# --- bad samples, which the index states as they are


def keyed(items, sample=4):
    return items[3 * sample][0].split(".")[0]


def altered(items, field, data, sample=4):
    """`data`: the new content of a member of a sample, or what makes it of the old one; None removes the member."""
    out = []
    for number, (name, old) in enumerate(items):
        if number // 3 == sample and (name.endswith(field) if isinstance(field, str) else name.endswith(tuple(field))):
            if data is not None:
                out.append((name, data(old) if callable(data) else data))
        else:
            out.append((name, old))
    return out


def renamed(items, old, new, sample=4):
    return [
        (name.replace(old, new) if number // 3 == sample else name, data) for number, (name, data) in enumerate(items)
    ]


def meta(**changes):
    return lambda old: json.dumps({**json.loads(old), **changes}).encode()


# What is done to a shard's members, the check that finds it, and the reason.
BAD = {
    "no cls": (lambda items: altered(items, ".cls", None), "sample", "it has no cls"),
    "no json": (lambda items: altered(items, ".json", None), "sample", "it has no json"),
    "no image": (lambda items: altered(items, IMAGES, None), "sample", "no image: it has 'cls, json'"),
    "two images": (lambda items: [*items[:13], (f"{keyed(items)}.jpeg", b"x"), *items[13:]], "sample", "2 images"),
    "empty image": (lambda items: altered(items, IMAGES, b""), "sample", "has 0 bytes"),
    "key twice": (lambda items: renamed(items, keyed(items), keyed(items, 0)), "sample", "its key comes twice"),
    "path upwards": (lambda items: renamed(items, keyed(items), "../x"), "sample", "'..' in its path"),
    "absolute path": (lambda items: renamed(items, keyed(items), "/x"), "sample", "an absolute path"),
    "no label": (lambda items: altered(items, ".cls", b"cat"), "label", "its cls holds b'cat', and labels are in"),
    "label too large": (lambda items: altered(items, ".cls", b"3"), "label", "its cls holds b'3', and labels are in"),
    "no JSON": (lambda items: altered(items, ".json", b"{"), "json", "its json cannot be read"),
    "no object": (lambda items: altered(items, ".json", b"[]"), "json", "its json is no object but a list"),
    "class": (
        lambda items: altered(items, ".json", meta(wnid="n1")),
        "json",
        "its wnid is 'n1', and its label's",
    ),
    "width": (lambda items: altered(items, ".json", meta(width=99)), "json", "its width is 99, and the image's is"),
    "filename": (lambda items: altered(items, ".json", meta(filename=7)), "json", "its filename is 7, no text"),
    "text": (lambda items: altered(items, IMAGES, b"text"), "decode", "it is neither JPEG, PNG nor WebP"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_samples(one, name):
    root, items = one
    change, check_name, reason = BAD[name]
    reshape(root, change(items))
    first = next(item for item in check(root).findings if item.check == check_name)
    assert reason in first.reason


def test_an_image_that_cannot_be_decoded_to_its_end(one):
    root, items = one
    jpeg = next(number for number, (name, _) in enumerate(items) if name.endswith(".jpg"))
    reshape(root, altered(items, ".jpg", lambda data: data[:-20], jpeg // 3))
    assert check(root, decode=0).findings == ()
    finding = only(check(root, decode=None))
    assert (finding.check, finding.key) == ("decode", keyed(items, jpeg // 3))
    assert "truncated" in finding.reason


def test_an_image_under_the_name_of_another_type_is_a_warning(one):
    root, items = one
    png = next(number for number, (name, _) in enumerate(items) if name.endswith(".png"))
    reshape(root, renamed(items, ".png", ".jpg", png // 3))
    report = check(root)
    assert only(report).reason == "the field is jpg, and the image is png"
    assert (report.num_errors, report.num_warnings) == (0, 1)


def test_a_key_in_two_shards(index):
    (index.root / SHARD).write_bytes((index.root / "train-000002.tar").read_bytes())
    report = check(index.root, decode=0)
    keys = [item for item in report.findings if item.check == "key"]
    assert len(keys) == 4
    assert {(item.shard, item.reason) for item in keys} == {("train-000002.tar", f"the same key is in {SHARD}")}


# --- classes


def test_classes_without_images_are_a_warning(one):
    root, items = one
    kept = [name.split(".")[0] for name, data in items if name.endswith(".cls") and data != b"1"]
    reshape(root, [(name, data) for name, data in items if name.split(".")[0] in kept])
    report = check(root)
    assert only(report).reason == "1 classes have no image: 'c1'"
    assert (report.num_errors, report.num_warnings) == (0, 1)
    assert report.splits["train"].classes_without_images == 1


def test_a_class_list(index, tmp_path):
    path = tmp_path / "classes.txt"
    for lines, reason in (
        ("c0\nc1\nc2\n", None),
        ("c0\nc1\nc3\n", r"has 3 classes and must have 3: 1 missing ('c3'); 1 extra ('c2')"),
        ("c1\nc0\nc2\n", "in another order"),
    ):
        path.write_text(lines)
        report = check(index.root, decode=0, classes=str(path))
        assert reason is None or reason in only(report).reason
        assert report.num_errors == (reason is not None)


# --- duplicates


def test_duplicates_within_a_split(source, written, tmp_path):
    shutil.copy(source / "c0/c0_00000.JPEG", source / "c0/c0_copy.JPEG")
    shutil.copy(source / "c0/c0_00001.JPEG", source / "c2/c2_copy.JPEG")
    root = written(source, tmp_path / "out").root
    report = check(root)
    assert report.counts == {WITHIN: 1, WITHIN + OTHER_CLASS: 1}
    same, other = sorted(report.findings)
    assert {same.key, same.reason.split("'")[1]} == {"c0_00000", "c0_copy"}
    assert " of class 'c0' in train-" in same.reason
    assert {other.key, other.reason.split("'")[1]} == {"c0_00001", "c2_copy"}
    assert (report.num_errors, report.num_warnings) == (0, 2)
    assert check(root, fail_on_duplicates=True).num_errors == 2


def place(root, images):
    """Class folders of the given images."""
    for name, data in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture
def three(written, image, tmp_path):
    """Directory and OTHER: image 1 is in train, val and OTHER; 2 in train and val; 3 in train and OTHER, as c9."""
    jpegs = [image(seed) for seed in range(10)]
    train = {f"c{label}/{seed}.jpg": jpegs[seed] for label, seed in enumerate((1, 2, 3))}
    val = {"c0/a.jpg": jpegs[1], "c1/b.jpg": jpegs[2], "c2/4.jpg": jpegs[4]}
    other = {"c0/z.jpg": jpegs[1], "c9/y.jpg": jpegs[3], "c8/5.jpg": jpegs[5], "c8/copy.jpg": jpegs[5]}
    written(place(tmp_path / "train", train), tmp_path / "out")
    written(place(tmp_path / "val", val), tmp_path / "out", "val")
    written(place(tmp_path / "test", other), tmp_path / "other", "test")
    return tmp_path / "out", tmp_path / "other"


def test_duplicates_across_splits(three):
    report = check(three[0])
    assert report.counts == {ACROSS: 2}
    assert (report.num_errors, report.num_warnings) == (0, 2)
    assert {(item.shard, item.key, item.reason) for item in report.findings} == {
        ("train-000000.tar", "c0_1", "the same image as 'c0_a' of class 'c0' in val-000000.tar"),
        ("train-000000.tar", "c1_2", "the same image as 'c1_b' of class 'c1' in val-000000.tar"),
    }
    assert check(three[0], splits=("val",)).counts == {}


def test_duplicates_in_another_directory(three):
    root, other = three
    report = check(root, against=other)
    assert report.counts == {ACROSS: 1, IN_OTHER: 1, IN_OTHER + OTHER_CLASS: 1}
    tar = other / "test-000000.tar"
    assert {(item.check, item.key, item.reason) for item in report.findings} == {
        (ACROSS, "c1_2", "the same image as 'c1_b' of class 'c1' in val-000000.tar"),
        (IN_OTHER, "c0_1", f"the same image as 'c0_a' of class 'c0' in val-000000.tar, 'c0_z' of class 'c0' in {tar}"),
        (IN_OTHER + OTHER_CLASS, "c2_3", f"the same image as 'c9_y' of class 'c9' in {tar}"),
    }
    assert check(root, against=other, fail_on_duplicates=True).num_errors == 3


def test_another_directory_that_is_not_whole(three):
    root, other = three
    with pytest.raises(UserError, match=r"--against .* is the directory itself"):
        check(root, against=root)
    rows = np.load(other / "test.offsets.npy")
    rows["size"] = 10**6
    np.save(other / "test.offsets.npy", rows)
    with pytest.raises(UserError, match=r"test-000000.tar cannot be compared with \(the file ends after"):
        check(root, against=other)
    (other / "index.json").unlink()
    with pytest.raises(UserError, match=r"other has no index\.json"):
        check(root, against=other)


def test_a_spill_finds_what_sorting_in_memory_finds(tmp_path):
    rng = np.random.default_rng(0)
    rows = np.zeros(5000, ROW)
    # Few enough digests to collide, in high alone and in both; spread over all parts.
    rows["high"], rows["low"] = rng.integers(0, 40, 5000) << 58, rng.integers(0, 40, 5000)
    rows["place"], rows["offset"] = rng.integers(0, 9, 5000), rng.permutation(5000)
    rows["high"] += rng.integers(0, 3, 5000).astype(np.uint64)
    spill = Spill(tmp_path / "spill")
    for part in np.array_split(rows, 7):
        spill.add(part)
    spill.add(rows[:0])
    groups: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for row in rows.tolist():
        groups.setdefault(row[:2], []).append(row[2:])
    expected = {key: sorted(items) for key, items in groups.items() if len(items) > 1}
    found = [[tuple(row) for row in group.tolist()] for group in spill.groups()]
    assert {group[0][:2]: [row[2:] for row in group] for group in found} == expected
    assert len(found) == len(expected)


# --- tars that make_shards did not write


def test_tars_indexed_in_place(image, tmp_path):
    """Their fields may be others; what they say of the class must agree with the index."""
    items = []
    for number in range(4):
        label = number % 2
        items += [(f"d/{number}.jpeg", image(number)), (f"d/{number}.json", json.dumps({"label": label}).encode())]
    items += [("d/bad.jpeg", image(9)), ("d/bad.json", b"{}")]
    (tmp_path / "set-train-0000.tar").write_bytes(tar_of(items))
    with open_engine("local", 1) as engine:
        index_in_place(tmp_path, ForeignOptions(max_bad=1), engine, lambda images, num_bytes: None)
    report = check(tmp_path)
    finding = only(report)
    assert (finding.check, finding.key) == ("left out", "d/bad")
    assert (report.num_errors, report.splits["train"].images) == (0, 4)
    assert report.splits["train"].most_images_a_class == 2
    wrong = [(name, data.replace(b"}", b', "wnid": "n1"}') if name == "d/2.json" else data) for name, data in items]
    (tmp_path / "set-train-0000.tar").write_bytes(tar_of(wrong))
    findings = [item for item in check(tmp_path).findings if item.check == "json"]
    assert [item.reason for item in findings] == ["it names the class 'n1', and the index has '0'"]
    rows = np.load(tmp_path / "train.offsets.npy")
    rows["label"][1] = 9
    np.save(tmp_path / "train.offsets.npy", rows)
    findings = [item for item in check(tmp_path).findings if item.check == "label"]
    assert [item.reason for item in findings] == ["the index has label 9, and labels are in [0, 2)"]


# --- what cannot be checked


def test_what_cannot_be_checked(index, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        check(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no split 'trian' .* Did you mean 'train'"):
        check(index.root, splits=("trian",))
    with pytest.raises(UserError, match="there is no class list '2k'"):
        check(index.root, classes="2k")
    with pytest.raises(UserError, match="-1 images to decode: give a number from 0 on"):
        check(index.root, decode=-1)
    (index.root / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index.json is malformed .* rebuild it from them with --repair-index"):
        check(index.root)
