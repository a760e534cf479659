"""Index in place: tars of others are read as they lie, and what is wrong with a sample is said."""

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from foreign_tars import link, picture, sample, write_tar

from shards.durable import locked
from shards.engine import open_engine
from shards.errors import UserError
from shards.index import Index
from shards.reader import Reader
from shards.tars.in_place import IN_PLACE, ForeignOptions, index_in_place, split_of


def run(directory, workers=1, advance=lambda images, num_bytes: None, **options):
    with open_engine("local", workers) as engine:
        return index_in_place(directory, ForeignOptions(**options), engine, advance)


def everything(index, split):
    """(image bytes, label) of each sample, in order."""
    reader = Reader(index, split)
    return [reader.read(position, bytes) for position in range(len(reader))]


def files(directory):
    """Content and identity of the directory's files: a file that was replaced has another inode."""
    return {path.name: (path.read_bytes(), path.stat().st_ino) for path in directory.iterdir() if path.is_file()}


@pytest.fixture
def tars(tmp_path):
    """Two tars of split train, of 3 samples each."""
    directory = tmp_path / "tars"
    for number in range(2):
        samples = [sample(f"{number}{label}", label, wnid=f"n{label}") for label in range(3)]
        write_tar(directory / f"imagenet1k-train-{number:04d}.tar", *samples)
    return directory


def one_tar(directory, *samples):
    """A directory that holds one tar of the samples."""
    write_tar(directory / "train-0.tar", *samples)
    return directory


# --- tars as people have them


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("imagenet1k-train-0000.tar", "train"),
        ("imagenet1k-validation-00.tar", "validation"),
        ("imagenet_w21-train-0000.tar", "train"),
        ("train-000000.tar", "train"),
        ("some-data-set-val_b-7.tar", "val_b"),
        ("train-00000-of-00256.tar", "train"),
    ],
)
def test_the_name_tells_the_split(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize("name", ["00000.tar", "train.tar", "train_0000.tar", "-0000.tar", "_-0.tar"])
def test_a_name_without_a_split(name):
    with pytest.raises(UserError, match=f"the name of '{name}' tells no split.*--split NAME"):
        split_of(name)


def test_shards_of_webdatasets_own_writer(tmp_path):
    written = {"train": [], "validation": []}
    for split, samples in written.items():
        with webdataset.ShardWriter(f"{tmp_path}/imagenet1k-{split}-%04d.tar", maxcount=4, verbose=0) as writer:
            for number in range(10):
                image = picture(number)
                writer.write({"__key__": f"{split}{number}", "jpg": image, "json": {"label": number % 3}})
                samples.append((image, number % 3))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = run(tmp_path)
    assert [split.name for split in done.index.splits] == ["train", "validation"]
    assert [shard.num_samples for shard in done.index.split("train").shards] == [4, 4, 2]
    for split, samples in written.items():
        assert everything(done.index, split) == samples
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert set(files(tmp_path)) == {*before, ".lock", "index.json", "train.offsets.npy", "validation.offsets.npy"}


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_directories_long_names_other_orders_and_types(tmp_path, tar_format):
    long = "d" * 90 + "/" + "x" * (99 if tar_format != tarfile.USTAR_FORMAT else 60)
    directory = tarfile.TarInfo("./train")
    directory.type = tarfile.DIRTYPE
    image, label, meta = sample("./train/b", 1, "png", wnid="n1")
    tars = one_tar(
        tmp_path / "tars",
        [directory, ("__meta__/info.json", b"{}"), ("train/.hidden", b"?"), ("README", b"?")],
        sample("./train/a", 0, "webp"),
        [meta, label, ("./train/b.txt", b"a caption"), image],
        sample(long, 2, "jpeg", label=7),
    )
    done = run(tars)
    assert everything(done.index, "train") == [(picture(0, "webp"), 0), (picture(1, "png"), 1), (picture(2), 2)]
    assert (done.index.classes, done.num_unnamed) == (("0", "n1", "2"), 2)


def test_our_own_tars_give_the_index_that_their_writer_gave(index: Index, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in index.root.glob("*.tar"):
        shutil.copy(path, bare)
    with open_engine("local", 1) as engine:
        found = index_in_place(bare, ForeignOptions(), engine, lambda images, num_bytes: None).index
    assert found.fingerprint("train") == index.fingerprint("train")
    assert (bare / "train.offsets.npy").read_bytes() == (index.root / "train.offsets.npy").read_bytes()
    assert found.split("train").made_from == {IN_PLACE: "label: cls or json; classes: found"}


# --- labels and classes


def test_class_names_of_json(tmp_path):
    samples = [sample("a", 0, wnid="x"), sample("b", 1, class_id="y", synset="z"), sample("c", 2, wnid=3, synset="z")]
    assert run(one_tar(tmp_path, *samples)).index.classes == ("x", "y", "z")


def test_labels_without_names(tmp_path):
    done = run(one_tar(tmp_path, sample("a", 3), sample("b", 1)))
    assert (done.index.classes, done.num_unnamed) == (("0", "1", "2", "3"), 4)


def test_a_label_field_that_is_named(tmp_path):
    done = run(one_tar(tmp_path, sample("a", 7, label=5, fine=2)), label="fine")
    assert done.index.offsets("train")["label"].tolist() == [2]


def test_classes_that_are_given(tars):
    assert run(tars, classes=("n0", "n1", "n2", "n3")).index.classes == ("n0", "n1", "n2", "n3")
    with pytest.raises(UserError, match=r"label 0 is class 'n1', and in imagenet1k-train-0000\.tar it is class 'n0'"):
        run(tars, classes=("n1", "n0", "n2"))
    with pytest.raises(UserError, match=r"its label 2 is not in \[0, 2\)"):
        run(tars, classes=("n0", "n1"))


def test_a_label_that_is_two_classes(tars):
    write_tar(tars / "imagenet1k-train-0002.tar", sample("a", 1, wnid="n5"))
    with pytest.raises(
        UserError, match=r"label 1 is class 'n\d', and in imagenet1k-train-000\d\.tar it is class 'n\d'"
    ):
        run(tars)
    write_tar(tars / "imagenet1k-train-0002.tar", sample("a", 4, wnid="n4"), sample("b", 4, wnid="n5"))
    with pytest.raises(UserError, match=r"label 4 is class 'n4', and in .*0002\.tar, sample 'b' it is class 'n5'"):
        run(tars)


def test_a_class_with_two_labels(tars):
    write_tar(tars / "imagenet1k-train-0002.tar", sample("a", 5, wnid="n1"))
    with pytest.raises(UserError, match="labels 1 and 5 are both class 'n1'"):
        run(tars)


# --- samples that cannot be indexed

LABEL = ("a.cls", b"0")
IMAGE = ("a.jpg", picture(0))
BAD = {
    "no image": ([LABEL, ("a.bmp", b"BM")], "no image: it has 'bmp, cls' and no jpg or jpeg or png or webp"),
    "empty image": ([("a.jpg", b""), LABEL], "its jpg has 0 bytes; 1 to 268435456 are accepted"),
    "no label": ([IMAGE], "no label: it has neither cls nor json"),
    "no label in json": ([IMAGE, ("a.json", b"{}")], "no label: 'label' of its json is None"),
    "text as label": ([IMAGE, ("a.cls", b"dog")], "no label: its cls is b'dog'"),
    "negative label": ([IMAGE, ("a.cls", b"-1")], "no label: its cls is b'-1'"),
    "bool as label": ([IMAGE, ("a.json", b'{"label": true}')], "no label: 'label' of its json is True"),
    "digits as label": ([IMAGE, ("a.cls", b"9" * 5000)], r"no label: its cls is b'9{198}\.\.\.$"),
    "label of a billion": ([IMAGE, ("a.cls", b"999999999")], r"its label 999999999 is not in \[0, 100000\)"),
    "no JSON": ([IMAGE, ("a.json", b"{")], "its json cannot be read .JSONDecodeError"),
    "deep JSON": ([IMAGE, ("a.json", b"[" * 100_000)], "its json cannot be read .RecursionError"),
    "no JSON object": ([IMAGE, ("a.json", b"[]")], "its json is no object but a list"),
    "large JSON": ([IMAGE, ("a.json", bytes(2**20 + 1))], "its json has 1048577 bytes; 1 to 1048576 are accepted"),
    "long class": ([IMAGE, LABEL, ("a.json", b'{"wnid": "%s"}' % (b"n" * 201))], "its class has a name of 201 char"),
    "link": ([link("a.jpg", "/etc/passwd"), LABEL], "its jpg is a link"),
    "two images": ([IMAGE, IMAGE, LABEL], "two members are its jpg"),
    "upwards": ([("../a.jpg", picture(0)), ("../a.cls", b"0")], r"\.\." + "' in its path"),
    "absolute": ([("/a.jpg", picture(0)), ("/a.cls", b"0")], "an absolute path"),
    "no UTF-8": ([("a\udcff.jpg", picture(0)), ("a\udcff.cls", b"0")], r"'a\\udcff': its name is not UTF-8"),
    "same key": (sample("good", 0), "its key comes twice in the tar"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample(tmp_path, kind):
    members, reason = BAD[kind]
    tars = one_tar(tmp_path, sample("good", 0), sample("next", 1), members)
    with pytest.raises(UserError, match=rf"1 or more samples cannot be indexed, and 0 may be left out(.|\n)*{reason}"):
        run(tars)
    done = run(tars, max_bad=1)
    assert (len(done.left_out), done.num_left_out) == (1, 1)
    assert done.left_out[0].startswith("train-0.tar: '")
    assert done.left_out[0].isprintable()
    assert everything(done.index, "train") == [(picture(0), 0), (picture(1), 1)]
    assert done.index.split("train").made_from["left out of train-0.tar"] == 1


def test_a_list_of_bad_samples_is_short(tmp_path):
    bad = [(f"{number:02d}.jpg", picture(0)) for number in range(30)]
    tars = one_tar(tmp_path, sample("good", 0), bad)
    with pytest.raises(UserError) as error:
        run(tars, max_bad=29)
    assert str(error.value).count("train-0.tar: ") == 20
    assert str(error.value).startswith("30 or more samples cannot be indexed, and 29 may be left out")
    assert run(tars, max_bad=30).num_left_out == 30


def test_a_tar_without_samples(tmp_path):
    tars = one_tar(tmp_path, [("a.jpg", picture(0))])
    with pytest.raises(UserError, match=r"train-0\.tar has no sample that can be indexed\n.*'a': no label"):
        run(tars, max_bad=9)


@pytest.mark.parametrize("keep", [100, 512, 600, 2000])
def test_a_truncated_tar(tars, keep):
    os.truncate(tars / "imagenet1k-train-0001.tar", keep)
    with pytest.raises(UserError, match=r"imagenet1k-train-0001\.tar' is no tar or damaged at byte"):
        run(tars)
    assert not (tars / "index.json").exists()


def test_a_header_that_claims_ten_gigabytes(tmp_path):
    claim = tarfile.TarInfo("a.json")
    claim.size = 10 << 30
    (tmp_path / "train-0.tar").write_bytes(claim.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(UserError, match=r"'a\.json' claims 10737418240 bytes, and 2048 are left"):
        run(tmp_path)


def test_directories_without_tars(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no \.tar files"):
        run(tmp_path)


def test_options_that_cannot_be():
    with pytest.raises(UserError, match=r"'\.\./x' cannot name a split"):
        ForeignOptions(split="../x")
    with pytest.raises(UserError, match="-1 samples left out at most"):
        ForeignOptions(max_bad=-1)


# --- again


def test_progress_counts_images_and_bytes(tars):
    counts = []
    run(tars, advance=lambda *count: counts.append(count))
    num_bytes = sum(path.stat().st_size for path in tars.glob("*.tar"))
    assert np.sum(counts, axis=0).tolist() == [6, num_bytes]


def test_two_processes_make_the_same_index(tars, tmp_path):
    copied = Path(shutil.copytree(tars, tmp_path / "copied"))
    assert run(tars).num_tars_read == run(copied, workers=2).num_tars_read == 2
    for name in ("index.json", "train.offsets.npy"):
        assert (copied / name).read_bytes() == (tars / name).read_bytes()


def test_indexing_again_reads_nothing(tars):
    first = run(tars)
    before = files(tars)
    again = run(tars)
    assert (first.num_tars_read, again.num_tars_read) == (2, 0)
    assert again.index == first.index
    assert files(tars) == before


def test_a_changed_tar_alone_is_read_again(tars, tmp_path):
    run(tars)
    for directory in (tars, tmp_path / "anew"):
        write_tar(directory / "imagenet1k-train-0000.tar", sample("x", 3, wnid="n3"))
    shutil.copy(tars / "imagenet1k-train-0001.tar", tmp_path / "anew")
    with pytest.raises(UserError, match="was cut short or replaced"):
        Index.load(tars)
    done = run(tars)
    assert done.num_tars_read == 1
    assert done.index.classes == ("n0", "n1", "n2", "n3")
    run(tmp_path / "anew")
    for name in ("index.json", "train.offsets.npy"):
        assert (tars / name).read_bytes() == (tmp_path / "anew" / name).read_bytes()


def test_left_out_samples_stay_counted(tars):
    write_tar(tars / "imagenet1k-train-0002.tar", sample("x", 0), [("y.jpg", picture(0))])
    run(tars, max_bad=1)
    again = run(tars, max_bad=1)
    assert (again.num_tars_read, again.num_left_out, again.left_out) == (0, 1, ())
    with pytest.raises(UserError, match=r"1 or more samples cannot be indexed(.|\n)*'y': no label"):
        run(tars)


def test_removed_tars_and_other_names_for_splits(tars):
    run(tars)
    (tars / "imagenet1k-train-0000.tar").unlink()
    done = run(tars)
    assert (done.num_tars_read, done.index.split("train").num_samples) == (0, 3)
    renamed = run(tars, split="test")
    assert [split.name for split in renamed.index.splits] == ["test"]
    assert not (tars / "train.offsets.npy").exists()


def test_other_options_read_again(tars):
    run(tars)
    assert run(tars, classes=("n0", "n1", "n2")).num_tars_read == 2
    assert run(tars, classes=("n0", "n1", "n2")).num_tars_read == 0
    assert run(tars, classes=("n0", "n1", "n2", "n3")).num_tars_read == 2


def test_what_an_interrupted_run_read_is_not_read_again(tars):
    tar = tars / "imagenet1k-train-0001.tar"
    whole = tar.read_bytes()
    os.truncate(tar, 600)
    with pytest.raises(UserError, match="damaged"):
        run(tars)
    tar.write_bytes(whole)
    assert run(tars).num_tars_read == 1
    assert not (tars / ".indexing").exists()


def test_a_tar_mended_to_the_same_size_is_read_again(tars):
    tar = tars / "imagenet1k-train-0001.tar"
    whole = tar.read_bytes()
    write_tar(tar, *(sample(key, 0, wnid="n0") for key in ("a", "b")), sample("c", 0, wnod="n0")[:2], [("d.json", b"")])
    tar.write_bytes(tar.read_bytes().ljust(len(whole), b"\0"))
    with pytest.raises(UserError, match="'d': its json has 0 bytes"):
        run(tars)
    tar.write_bytes(whole)
    assert run(tars).num_tars_read == 1


def test_offsets_of_a_run_that_was_killed_before_its_manifest(tars):
    before = run(tars).index
    np.save(tars / "train.offsets.npy", np.zeros_like(before.offsets("train")))
    assert run(tars).num_tars_read == 2
    assert len(everything(before, "train")) == 6


def test_two_runs_at_once(tars):
    with locked(tars), pytest.raises(UserError, match="another process is writing"):
        run(tars)


# --- beside shards of ours


def test_splits_of_ours_stay(index: Index):
    offsets = (index.root / "train.offsets.npy").read_bytes()
    write_tar(index.root / "imagenet1k-validation-0.tar", sample("a", 2, wnid="c2"))
    done = run(index.root)
    assert done.num_tars_read == 1
    assert done.index.split("train") == index.split("train")
    assert done.index.classes == index.classes
    assert (index.root / "train.offsets.npy").read_bytes() == offsets
    assert everything(done.index, "validation") == [(picture(2), 2)]


def test_labels_and_classes_are_those_of_our_splits(index: Index):
    tar = write_tar(index.root / "imagenet1k-validation-0.tar", sample("a", 3))
    with pytest.raises(UserError, match=r"its label 3 is not in \[0, 3\)"):
        run(index.root)
    write_tar(tar, sample("a", 2, wnid="c1"))
    with pytest.raises(UserError, match=r"label 2 is class 'c2', and in .* it is class 'c1'"):
        run(index.root)
    with pytest.raises(UserError, match="the 2 classes given are not, in this order, the 3 of the splits"):
        run(index.root, classes=("c0", "c1"))


def test_a_tar_that_would_be_of_a_split_of_ours(index: Index):
    write_tar(index.root / "imagenet1k-train-0.tar", sample("a", 2))
    with pytest.raises(
        UserError, match=r"imagenet1k-train-0\.tar would be a shard of split 'train'.*move the tar away"
    ):
        run(index.root)
    assert run(index.root, split="more").index.split("train") == index.split("train")


def test_a_split_of_ours_that_is_unfinished(tars):
    (tars / "train.unfinished").mkdir()
    with pytest.raises(UserError, match=r"split 'train' in .* is unfinished: run the make_shards command"):
        run(tars)


def test_a_tar_that_is_a_link_to_nothing(tars):
    (tars / "imagenet1k-train-0002.tar").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"cannot read .*0002\.tar \(No such file or directory\)"):
        run(tars)
