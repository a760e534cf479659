"""tools/make_demo_data.py: what it writes, that the same seed gives the same bytes, and how it refuses."""

import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tools import make_demo_data

SMALL = ["--classes", "3", "--per-class", "12"]


def run(out, *arguments):
    return make_demo_data.main([str(out), *arguments])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "data"
    assert run(out, *SMALL) == 0
    return out


def test_counts(data):
    files = contents(data)
    splits = Counter("/".join(name.split("/")[:2]) for name in files if name.endswith(".jpg"))
    assert splits == {
        "formula/train": 36,
        "formula/val": 3,
        "digits/train": 1198,
        "digits/val": 599,
        "digits/few0": 100,
        "digits/few1": 100,
        "digits/few2": 100,
    }
    assert {path.name for path in (data / "digits" / "val").iterdir()} == set("0123456789")
    assert all(len(list(folder.iterdir())) == 10 for folder in (data / "digits" / "few1").iterdir())


def test_images_are_jpeg_of_the_size_asked_and_not_blank(data):
    for path in [*(data / "formula").rglob("*.jpg"), *(data / "digits" / "few0").rglob("*.jpg")]:
        image = Image.open(path)
        assert (image.format, image.size) == ("JPEG", (32, 32))
        assert np.ptp(np.asarray(image)) > 80


def test_few_label_sets_differ_and_come_from_train(data):
    train = set(contents(data / "digits" / "train").values())
    few = [set(contents(data / "digits" / f"few{seed}").values()) for seed in range(3)]
    assert all(images <= train for images in few)
    assert few[0] != few[1] != few[2]


def test_no_digit_is_in_both_train_and_val(data):
    train, val = (set(contents(data / "digits" / split).values()) for split in ("train", "val"))
    assert len(train) == 1198
    assert not train & val


def test_images_of_a_class_are_nearer_to_each_other_than_to_another_class(data):
    folders = sorted((data / "formula" / "train").iterdir())
    classes = np.array([[np.asarray(Image.open(path)) for path in sorted(folder.iterdir())] for folder in folders])
    within = classes.std(axis=1).mean()
    assert 0 < within < classes.reshape(-1, 32, 32).std(axis=0).mean()


def test_same_seed_same_bytes_another_seed_other_glyphs(data, tmp_path):
    assert run(tmp_path / "same", *SMALL) == 0
    assert run(tmp_path / "other", *SMALL, "--seed", "1") == 0
    assert contents(tmp_path / "same") == contents(data)
    assert contents(tmp_path / "other" / "digits") == contents(data / "digits")
    ours, theirs = (contents(folder / "formula") for folder in (data, tmp_path / "other"))
    assert ours.keys() == theirs.keys()
    assert not set(ours.values()) & set(theirs.values())


def test_a_complete_directory_is_left_alone(data, capsys):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    assert run(data, *SMALL) == 0
    assert "already complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in data.rglob("*")}


def test_an_interrupted_run_is_done_again(data, tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(make_demo_data, "write_digits", fail)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "data", *SMALL)
    monkeypatch.undo()
    assert not (tmp_path / "data").exists()
    assert run(tmp_path / "data", *SMALL) == 0
    assert contents(tmp_path / "data") == contents(data)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_other_options_or_other_files_are_refused(data, tmp_path, capsys):
    copy = shutil.copytree(data, tmp_path / "copy")
    assert run(copy, "--classes", "4", "--per-class", "12") == 2
    assert "holds demo data of other options ({'classes': 3," in capsys.readouterr().err
    (copy / "demo.json").unlink()
    assert run(copy, *SMALL) == 2
    assert "exists and is no demo data (no demo.json in it); choose another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "lowest"), [("--classes", 1, 2), ("--per-class", 0, 1), ("--size", 4, 8), ("--seed", -1, 0)]
)
def test_options_out_of_range(tmp_path, capsys, option, value, lowest):
    assert run(tmp_path / "data", option, str(value)) == 2
    assert capsys.readouterr().err == f"make_demo_data: {option} is {value}, and must be at least {lowest}\n"
    assert not (tmp_path / "data").exists()
