"""The same images, whatever they come in, become the same shards; and each kind of source goes through the command."""

import csv
import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import scipy.io

from shards.classes import load_classes
from shards.engine import open_engine
from shards.errors import UserError
from shards.index import Index
from shards.sources.kinds import KINDS, Asked, open_source
from shards.writing.options import WriteOptions
from shards.writing.writer import plan, write

ROOT = Path(__file__).parents[2]
WNIDS = ("n01440764", "n01443537", "n02084071")
IMAGES = 9


@pytest.fixture
def folder(tmp_path, image):
    """Class folders with ImageNet's names."""
    root = tmp_path / "train"
    for label, wnid in enumerate(WNIDS):
        (root / wnid).mkdir(parents=True)
        for number in range(IMAGES):
            size = (12 + number, 8)
            (root / wnid / f"{wnid}_{number * 37}.JPEG").write_bytes(image(label * 100 + number, "JPEG", size))
    return root


@pytest.fixture
def classes(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(WNIDS) + "\n")
    return str(path)


def nested_tar(folder, path, mode="w", prefix=""):
    """A tar of one tar a class, whose images are in no order."""
    with tarfile.open(path, mode) as outer:
        for wnid in WNIDS:
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for file in sorted(folder.joinpath(wnid).iterdir(), key=lambda file: file.name[::-1]):
                    inner.add(file, file.name)
            info = tarfile.TarInfo(f"{prefix}{wnid}.tar")
            info.size = len(buffer.getvalue())
            outer.addfile(info, io.BytesIO(buffer.getvalue()))
    return path


def tar_of_folders(folder, path, mode="w"):
    with tarfile.open(path, mode) as tar:
        tar.add(folder, folder.name)
    return path


def parquet(folder, path):
    path.mkdir()
    rows = [
        {"image": {"bytes": file.read_bytes(), "path": f"{file.stem}_{wnid}.JPEG"}, "label": label}
        for label, wnid in enumerate(WNIDS)
        for file in folder.joinpath(wnid).iterdir()
    ]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path / "train-00000-of-00001.parquet", row_group_size=5)
    return path


def kaggle(folder, path):
    train = path / "ILSVRC/Data/CLS-LOC/train"
    train.parent.mkdir(parents=True)
    shutil.copytree(folder, train)
    return path


def webdataset(folder, path):
    with open_engine("local", 1) as engine:
        write(open_source("folder", Asked(str(folder), None, "train"), path), path, WriteOptions(seed=5), engine)
    return path


MADE = {
    "folder": lambda folder, path: shutil.copytree(folder, path),
    "tar": lambda folder, path: nested_tar(folder, path),
    "tar of folders": tar_of_folders,
    "tar, gzipped": lambda folder, path: nested_tar(folder, path, "w:gz"),
    "parquet": parquet,
    "kaggle": kaggle,
    "webdataset": webdataset,
}


def tars_of(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("train-*.tar"))}


def written(kind, path, classes, out, **options):
    source = open_source(kind, Asked(str(path), classes, "train"), out)
    options = WriteOptions(splits=("train",), shard_size="8", **options)
    with open_engine("local", 1) as engine:
        write(source, out, options, engine)
    return tars_of(out)


@pytest.mark.parametrize("made", MADE)
def test_the_same_images_become_the_same_shards(folder, classes, tmp_path, made):
    expected = written("folder", folder, classes, tmp_path / "expected", minival="12%")
    out = tmp_path / "out"
    out.mkdir()
    path = MADE[made](folder, tmp_path / "source")
    assert written(made.split(",")[0].split(" ")[0], path, classes, out, minival="12%") == expected
    assert len(expected) == 3
    assert Index.load(out).classes == WNIDS


def test_winter21_is_cut_by_the_rule(folder, tmp_path, image):
    """The class of 501 images is kept, its first 50 names validate; the class of 500 is no class of 21k-P."""
    archive = tmp_path / "winter21_whole.tar.gz"
    data = image(0)
    with tarfile.open(archive, "w:gz", compresslevel=1) as outer:
        for wnid, count in (("n00000001", 501), ("n00000002", 500)):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for number in reversed(range(count)):
                    info = tarfile.TarInfo(f"{wnid}_{number:04d}.JPEG")
                    info.size = len(data)
                    inner.addfile(info, io.BytesIO(data))
            info = tarfile.TarInfo(f"{wnid}.tar")
            info.size = len(buffer.getvalue())
            outer.addfile(info, io.BytesIO(buffer.getvalue()))
    out = tmp_path / "out"
    arguments = [sys.executable, "tools/make_shards.py", "winter21", str(archive), str(out), "--workers", "1"]
    refused = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "10450 missing" in refused.stderr
    assert "1 extra ('n00000001')" in refused.stderr or "n00000001" in refused.stderr
    names = out / "winter21_whole.tar.gz.names.tsv.gz"
    before = names.stat().st_mtime_ns
    (tmp_path / "fall.txt").write_text("n00000001\n")
    listed = [*arguments, "--classes", str(tmp_path / "fall.txt"), "--resize", "squash:224"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert names.stat().st_mtime_ns == before  # the pass over the names was not made again
    index = Index.load(out)
    assert {split.name: split.num_samples for split in index.splits} == {"train": 451, "val": 50}


def test_an_archive_is_not_read_once_more_for_an_estimate(folder, classes, tmp_path):
    """Of two splits the second lies deep: all are judged by the first, also where the second alone would differ."""
    archive = tmp_path / "imagenet21k_resized.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "imagenet21k_train")
        for file in sorted(folder.glob("*/*")):
            file.write_bytes(file.read_bytes() + bytes(5000))
        tar.add(folder, "imagenet21k_val")
    out = tmp_path / "out"
    begun = plan(open_source("resized21k", Asked(str(archive), classes), out), out, WriteOptions())
    assert begun.tasks[0].cost == begun.tasks[1].cost
    assert begun.tasks[0].cost.num_bytes < 5000


def test_resized21k_leaves_the_small_classes(folder, classes, tmp_path):
    archive = tmp_path / "imagenet21k_resized.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(folder, "imagenet21k_resized/imagenet21k_train")
        for wnid in WNIDS:
            tar.add(folder / wnid, f"imagenet21k_resized/imagenet21k_val/{wnid}")
            tar.add(folder / wnid, f"imagenet21k_resized/imagenet21k_small_classes/small_{wnid}")
    out = tmp_path / "out"
    with open_engine("local", 1) as engine:
        write(open_source("resized21k", Asked(str(archive), classes), out), out, WriteOptions(), engine)
    assert {split.name: split.num_samples for split in Index.load(out).splits} == {"train": 27, "val": 27}


def test_ilsvrc_validation_has_the_labels_of_its_devkit(folder, classes, tmp_path):
    """The ids of the devkit are in another order than the wnids."""
    ids = {wnid: number for number, wnid in zip((3, 1, 2), WNIDS, strict=True)}
    data = tmp_path / "ILSVRC2012_devkit_t12/data"
    data.mkdir(parents=True)
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    rows = [(ids[wnid], wnid, "word", 0) for wnid in WNIDS] + [(4, "n00001740", "entity", 3)]
    synsets = {"synsets": np.array(rows, dtype=fields)}
    scipy.io.savemat(data / "meta.mat", synsets)
    files = sorted(folder.glob("*/*"), key=lambda file: file.name[::-1])
    truth = "".join(f"{ids[file.parent.name]}\n" for file in files)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    archive = tmp_path / "ILSVRC2012_img_val.tar"
    with tarfile.open(archive, "w") as tar:
        for number, file in enumerate(files, 1):
            tar.add(file, f"ILSVRC2012_val_{number:08d}.JPEG")
    devkit = tar_of_folders(data.parent, tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz")
    out = tmp_path / "out"
    with open_engine("local", 1) as engine:
        asked = Asked(str(archive), classes, devkit=str(devkit))
        write(open_source("ilsvrc-val", asked, out), out, WriteOptions(), engine)
    index = Index.load(out)
    assert index.split("val").num_samples == 27
    with tarfile.open(out / "val-000000.tar") as tar:
        names = {member.name: tar.extractfile(member).read() for member in tar}
    for key in {name.split(".")[0] for name in names}:
        source = files[int(key.rsplit("_", 1)[1]) - 1]
        assert names[f"{key}.jpg"] == source.read_bytes()
        assert WNIDS[int(names[f"{key}.cls"])] == source.parent.name


def test_kaggle_has_both_splits(folder, classes, tmp_path):
    root = kaggle(folder, tmp_path / "kaggle")
    val = root / "ILSVRC/Data/CLS-LOC/val"
    val.mkdir()
    with open(root / "LOC_val_solution.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        for number, image in enumerate(sorted(folder.glob("*/*")), 1):
            name = f"ILSVRC2012_val_{number:08d}"
            shutil.copy(image, val / f"{name}.JPEG")
            rows.writerow([name, f"{image.parent.name} 1 2 3 4"])
    out = tmp_path / "out"
    with open_engine("local", 1) as engine:
        write(open_source("kaggle", Asked(str(root), classes), out), out, WriteOptions(), engine)
    assert {split.name: split.num_samples for split in Index.load(out).splits} == {"train": 27, "val": 27}


@pytest.mark.parametrize(
    ("kind", "name", "number"),
    [("tar", "ILSVRC2012_img_train.tar", "1000"), ("resized21k", "imagenet21k_resized.tar", "10450")],
)
def test_archives_of_imagenet_must_have_its_classes(folder, tmp_path, kind, name, number):
    archive = tmp_path / name
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, "imagenet21k_train")
    source = open_source(kind, Asked(str(archive), None, "train"), tmp_path)
    assert source.classes == load_classes(KINDS[kind].classes)
    with (
        pytest.raises(UserError, match=rf"3 classes and must have {number}: \d+ missing \('n0"),
        open_engine("local", 1) as engine,
    ):
        write(source, tmp_path / "out", WriteOptions(), engine)


def test_every_kind_explains_itself():
    for kind in (*KINDS, "index"):
        command = [sys.executable, "tools/make_shards.py", kind, "--help"]
        text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "--classes" in text
        assert "--workers" in text
