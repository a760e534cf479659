"""Whole samples by their ids: what webdataset's own reader gives for the same tars."""

import gc
import os
import pickle
import tarfile

import numpy as np
import pytest
import webdataset
from foreign_tars import link, picture, sample, write_tar

from shards.engine import open_engine
from shards.members import MemberReader
from shards.reader import BadSample, Reader
from shards.tars.in_place import ForeignOptions, index_in_place

# webdataset leaves its tars open for the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*tar'>:ResourceWarning")
LONG = "a-directory-of-a-name/" * 6 + "ümlaut"
LAYOUTS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def theirs(index):
    """webdataset's samples of split train, in order."""
    paths = [str(index.root / shard.name) for shard in index.split("train").shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    gc.collect()
    return [{name: value for name, value in found.items() if name != "__local_path__"} for found in samples]


def ours(index):
    reader = MemberReader(index, "train")
    return [reader.sample(number) for number in range(len(reader))]


def foreign(root, *tars, tar_format=tarfile.GNU_FORMAT, **options):
    """The index of foreign tars; each is a list of samples."""
    for number, samples in enumerate(tars):
        write_tar(root / f"train-{number}.tar", *samples, tar_format=tar_format)
    with open_engine("local", 1) as engine:
        return index_in_place(root, ForeignOptions(**options), engine, lambda images, num_bytes: None).index


def test_shards_of_ours(index):
    assert ours(index) == theirs(index)
    assert {*ours(index)[0]} - {"jpg", "png", "webp"} == {"__key__", "__url__", "cls", "json"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_foreign_tars(tmp_path, layout):
    """Fields in another order, more of them, an empty one, long names, and names that are not ASCII."""
    reordered = [("b.json", b'{"label": 1}'), ("b.seg.PNG", b"mask"), ("b.jpg", picture(1)), ("b.empty", b"")]
    names = ["d/e.f", "d/e"] if layout == "ustar" else [LONG, LONG + "2"]
    long = [member for name in names for member in sample(name, 2, text="é")]
    index = foreign(
        tmp_path, [sample("a", 0), reordered, long], [reordered, sample("z", 3)], tar_format=LAYOUTS[layout]
    )
    assert ours(index) == theirs(index)
    assert len(ours(index)) == 6 - (layout == "ustar")
    reader = MemberReader(index, "train")
    assert [reader.key(number) for number in range(len(reader))] == [found["__key__"] for found in theirs(index)]


def test_what_lies_between_samples_is_not_theirs(tmp_path):
    """Samples that the index left out, one with a key that comes again, and members that are none."""
    directory = tarfile.TarInfo("d")
    directory.type = tarfile.DIRTYPE
    no_image = [("b.cls", b"0"), ("b.txt", b"-")]
    samples = [
        sample("a", 0),
        no_image,
        sample("a", 1),
        [directory, ("__meta__/x.jpg", b"-")],
        sample("c", 2),
        no_image,
    ]
    members = [("d.jpg", picture(3)), directory, ("README", b"-"), ("__meta__/x.jpg", b"-"), ("__meta__", b"-")]
    members += [link("d.txt", "c.jpg"), (".hidden.jpg", b"-"), ("d.cls", b"1")]
    index = foreign(tmp_path, [*samples, members], max_bad=3)
    whole = theirs(index)
    assert [found["__key__"] for found in whole] == ["a", "b", "a", "c", "b", "d"]
    assert ours(index) == [whole[0], whole[3], whole[5]]


def test_a_reader_of_members_is_a_reader(index):
    reader, again = Reader(index, "train"), pickle.loads(pickle.dumps(MemberReader(index, "train")))
    for number in range(len(reader)):
        assert again.read(number, bytes) == reader.read(number, bytes)
        assert again.key(number) == reader.key(number) == again.sample(number)["__key__"]
    with pytest.raises(IndexError, match="sample 21 of split 'train', which has 21"):
        again.sample(21)


def shift(index, rows):
    """A shard that is not the indexed one, of the same size."""
    path = index.root / index.split("train").shards[0].name
    path.write_bytes(path.read_bytes()[512:] + bytes(512))
    return "the headers around it are damaged, or the shard is not the indexed one"


def mix_up(index, rows):
    """A sound tar, but not the indexed one."""
    first, second = (index.root / shard.name for shard in index.split("train").shards[:2])
    first.write_bytes(second.read_bytes().ljust(first.stat().st_size, b"\0"))
    return "no file of \\d+ bytes begins where the index has it|are damaged, or the shard is not the indexed one"


def cut(index, rows):
    os.truncate(index.root / index.split("train").shards[0].name, int(rows[2]["offset"]))
    return "OSError: the file ends after "


def remove(index, rows):
    (index.root / index.split("train").shards[0].name).unlink()
    return "FileNotFoundError"


def claim(index, rows):
    rows[3]["offset"] = 2**40
    np.save(index.root / "train.offsets.npy", rows)
    return "its members lie within \\d+ bytes, and 268435456 are the most"


def reverse(index, rows):
    rows[1:4] = rows[3:0:-1].copy()
    np.save(index.root / "train.offsets.npy", rows)
    return "its members lie within -\\d+ bytes"


@pytest.mark.parametrize("damage", [shift, mix_up, cut, remove, claim, reverse])
def test_a_bad_sample(index, damage):
    reason = damage(index, np.array(index.offsets("train")))
    reader = MemberReader(index, "train")
    with pytest.raises(BadSample, match=reason) as error:
        reader.sample(2)
    assert (error.value.sample, error.value.split) == (2, "train")
    assert reader.key(2) == error.value.key


def test_a_field_that_comes_twice(tmp_path):
    index = foreign(tmp_path, [[*sample("a", 0), ("a.txt", b"1"), ("a.TXT", b"2")], sample("b", 1)])
    reader = MemberReader(index, "train")
    with pytest.raises(BadSample, match=r"key 'a'.*two members are its txt"):
        reader.sample(0)
    assert reader.sample(1)["cls"] == b"1"
