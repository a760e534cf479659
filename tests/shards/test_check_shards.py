"""The command: exit codes, the summary, the report, and what its options do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import check_shards

ROOT = Path(__file__).parents[2]


def run(*arguments):
    """The command as a process: its exit code, stdout and stderr."""
    command = [sys.executable, "tools/check_shards.py", *(str(argument) for argument in arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def command(capsys):
    """The command in this process."""

    def call(directory, *options):
        code = check_shards.main([str(directory), "--workers", "1", *(str(option) for option in options)])
        return code, *capsys.readouterr()

    return call


def damage(index):
    path = index.root / "train-000002.tar"
    data = bytearray(path.read_bytes())
    data[int(index.offsets("train")[9]["offset"]) + 300] ^= 1
    path.write_bytes(data)


def test_nothing_is_wrong(index):
    code, out, err = run(index.root, "--decode", "all")
    assert code == 0
    first, last = out.splitlines()
    assert first == (
        f"train: 21 images, 5 shards, {index.split('train').num_bytes:,} bytes; 21 decoded; "
        "images a class: 7 to 7, median 7; 0 classes without images"
    )
    assert last.startswith("0 errors, 0 warnings; ")
    assert last.endswith(" MB/s")
    assert "checking: 21/21 images" in err


def test_errors(index, tmp_path):
    damage(index)
    code, out, _ = run(index.root, "--report", tmp_path / "report.json")
    assert code == 1
    lines = out.splitlines()
    assert lines[1].startswith("error: train-000002.tar: hash: its SHA-256 is ")
    assert lines[2] == "errors: 1 hash"
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert (report["errors"], report["warnings"], report["counts"]) == (1, 0, {"hash": 1})
    assert (report["directory"], report["against"]) == (str(index.root), "")
    assert report["splits"]["train"]["images"] == 21
    (finding,) = report["findings"]
    assert (finding["level"], finding["shard"], finding["key"]) == ("error", "train-000002.tar", "")


def test_what_cannot_be_checked(tmp_path):
    code, out, err = run(tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {tmp_path} has no index.json: ")
    assert err.endswith("; or, where all tars are there, rebuild it from them with --repair-index\n")


def test_repair(index, command):
    (index.root / "index.json").unlink()
    code, out, _ = command(index.root, "--repair-index")
    assert code == 0
    lines = out.splitlines()
    assert lines[:2] == ["repaired: index.json was made from the tars", "repaired: train: 21 images in 5 shards"]
    assert lines[-1].startswith("0 errors, 0 warnings; ")


def test_the_first_errors_are_shown_before_warnings(index, source, folders, written, tmp_path, command):
    """The second train split has 3 x 15 images, 14 of them the first one's; its offsets are wrong in all."""
    other = written(folders(tmp_path / "more", 3, 15), tmp_path / "other", shard_size=100)
    rows = np.array(other.offsets("train"))
    rows["size"] += 1
    np.save(other.root / "train.offsets.npy", rows)
    code, out, _ = command(other.root, "--against", index.root)
    assert code == 1
    lines = out.splitlines()
    shown = [line.split(":")[0] for line in lines[1:]]
    assert shown[:20] == ["error"] * 20
    assert [line for line in lines[21:-1] if line.startswith("errors")] == ["errors: 45 index", "errors: 1 offsets"]
    assert lines[-2].startswith("warnings: ")
    assert lines[-1].startswith("46 errors, ")


def test_duplicates_fail_where_they_are_told_to(source, written, tmp_path, command):
    shutil.copy(source / "c0/c0_00000.JPEG", source / "c1/c1_copy.JPEG")
    root = written(source, tmp_path / "out").root
    code, out, _ = command(root)
    assert code == 0
    assert "warning: train-000" in out
    assert "warnings: 1 duplicate within a split, of another class\n" in out
    code, out, _ = command(root, "--fail-on-duplicates")
    assert code == 1
    assert "errors: 1 duplicate within a split, of another class\n" in out


@pytest.mark.parametrize(("decode", "number"), [("all", 21), ("none", 0), ("5", 5), (None, 21)])
def test_decode(index, command, decode, number):
    code, out, _ = command(index.root, *(() if decode is None else ("--decode", decode)))
    assert code == 0
    assert f"; {number} decoded; " in out


@pytest.mark.parametrize("decode", ["some", "-1", "1.5", ""])
def test_a_decode_that_is_none(index, command, capsys, decode):
    with pytest.raises(SystemExit, match="2"):
        command(index.root, f"--decode={decode}")
    assert f"argument --decode: {decode!r} is neither all, none nor a number of images" in capsys.readouterr().err


def test_splits_and_classes(index, source, written, tmp_path, command):
    written(source, index.root, "val")
    classes = tmp_path / "classes.txt"
    classes.write_text("c0\nc1\nc2\n")
    code, out, _ = command(index.root, "--split", "val", "--classes", classes)
    assert code == 0
    assert out.startswith("val: 21 images, ")
    assert "train" not in out
    code, out, _ = command(index.root, "--classes", "1k")
    assert code == 1
    assert "error: index.json: classes: " in out
    assert "has 3 classes and must have 1000" in out


def test_a_contact_sheet(index, tmp_path, command):
    for seed in (0, 0, 1):
        assert command(index.root, "--contact-sheet", tmp_path / f"{seed}.png", "--seed", seed)[0] == 0
    with Image.open(tmp_path / "0.png") as first, Image.open(tmp_path / "1.png") as second:
        assert first.format == "PNG"
        assert first.tobytes() != second.tobytes()


def test_help_explains_each_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        check_shards.main(["--help"])
    text = capsys.readouterr().out
    for option in ("--split", "--decode", "--against", "--classes", "--fail-on-duplicates", "--report"):
        assert option in text
    for option in ("--contact-sheet", "--seed", "--repair-index", "--workers", "default: 1000", "Exit code"):
        assert option in text
