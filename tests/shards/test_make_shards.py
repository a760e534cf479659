"""The command itself, as a process: exit codes, messages, kills and a disk that refuses."""

import contextlib
import os
import pty
import resource
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from shards import progress
from shards.errors import UserError
from shards.index import Index

ROOT = Path(__file__).parents[2]


def command(*arguments):
    return [sys.executable, "tools/make_shards.py", *(str(argument) for argument in arguments)]


def run(*arguments, **options):
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False, **options)


def test_a_summary_and_then_nothing_to_do(source, tmp_path):
    arguments = ("folder", source, tmp_path / "out", "--split", "train", "--shard-size", 5, "--seed", 3)
    first, second = run(*arguments), run(*arguments)
    assert (first.returncode, second.returncode) == (0, 0)
    assert first.stdout.startswith("train: 21 images, 5 shards, ")
    assert "0 images were changed and 0 files left out: see " in first.stdout
    assert first.stdout.splitlines()[1].startswith("21 images in ")
    assert second.stdout.startswith("train: already complete: 21 images")
    assert "listing: 21 images" in first.stderr
    assert "writing: 21/21 images" in first.stderr
    assert Index.load(tmp_path / "out").split("train").made_from["seed"] == 3


def test_every_option(source, tmp_path):
    out = tmp_path / "out"
    classes = tmp_path / "classes.txt"
    classes.write_text("c0\nc1\nc2\n")
    (source / "c0/bad.jpg").write_bytes(b"bad")
    options = {
        "--split": "train",
        "--classes": classes,
        "--shard-size": "10KB",
        "--seed": 1,
        "--minival": "20%",
        "--max-bad": 1,
        "--resize": "short:16",
        "--quality": 70,
        "--format": "webp",
        "--workers": 2,
    }
    arguments = [part for option in options.items() for part in option]
    done = run("folder", source, out, *arguments, "--in-order", "--verify")
    assert done.returncode == 0, done.stderr
    index = Index.load(out)
    assert {split.name: split.num_samples for split in index.splits} == {"train": 18, "minival": 3}
    made_from = index.split("train").made_from
    expected = {"shard size": "10KB", "seed": 1, "minival": "20%", "resize": "short:16", "quality": "70"}
    assert expected.items() <= made_from.items()
    assert {"format": "webp", "verify": "True", "restart markers": "False"}.items() <= made_from.items()
    assert "1 files left out" in done.stdout


def test_a_dry_run_says_what_would_be(source, tmp_path):
    done = run("folder", source, tmp_path / "out", "--split", "train", "--shard-size", 5, "--dry-run")
    assert done.returncode == 0
    assert done.stdout.startswith("train: 21 images, 3 classes, 5 shards, about 0.000 GB (")
    assert " hours with " in done.stdout
    assert not list((tmp_path / "out").glob("*"))[1:]


def test_index_in_place(index, tmp_path):
    (index.root / "index.json").unlink()
    done = run("index", index.root, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("train: 21 images, 5 shards, ")
    assert "3 classes, 0 of them known by their label alone; 5 tars were read; 0 samples left out" in done.stdout
    again = Index.load(index.root)
    assert again.classes == index.classes
    assert (again.offsets("train") == index.offsets("train")).all()


@pytest.mark.parametrize("damage", ["missing", "empty class", "bad image"])
def test_bad_input_exits_with_2(source, tmp_path, damage):
    if damage == "missing":
        source, text = tmp_path / "nowhere", "nowhere' does not exist"
    elif damage == "empty class":
        (source / "c9").mkdir()
        text = "c9' has no images"
    else:
        (source / "c0/x.jpg").write_bytes(b"")
        text = "'c0/x.jpg': the file is empty"
    process = run("folder", source, tmp_path / "out", "--split", "train")
    assert process.returncode == 2
    assert "\nerror: " in process.stderr
    assert text in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("in_order", [False, True])
def test_a_killed_run_leaves_nothing_whole_and_is_resumed(folders, files_of, tmp_path, in_order):
    source = folders(tmp_path / "many", classes=4, images=40)
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    rest = ("--split", "train", "--shard-size", 1, "--workers", 2, *["--in-order"] * in_order)
    process = subprocess.Popen(command("folder", source, out, *rest), cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(list(out.glob("train-*.tar"))) < 40:
        assert process.poll() is None
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (out / "train-000159.tar.123.tmp").write_bytes(b"as if killed inside the last shard")
    with pytest.raises(UserError, match="has no index"):
        Index.load(out)
    before = {path: path.stat().st_ino for path in out.glob("train.unfinished/*.json") if path.stem.isdigit()}
    shards = [out / f"train-{path.stem}.tar" for path in before]
    inodes = [shard.stat().st_ino for shard in shards]
    assert run("folder", source, undisturbed, *rest).returncode == 0
    other = run("folder", source, out, "--split", "train", "--shard-size", 2)
    assert other.returncode == 2
    assert "is unfinished, and was begun from another source or with other options (shards: 160 there" in other.stderr
    assert run("folder", source, out, *rest).returncode == 0
    assert files_of(out) == files_of(undisturbed)
    assert [shard.stat().st_ino for shard in shards] == inodes  # those that were finished were not written again


def test_an_interrupted_run_says_how_to_go_on(folders, tmp_path):
    source, out = folders(tmp_path / "many", classes=4, images=100), tmp_path / "out"
    arguments = ("folder", source, out, "--split", "train", "--shard-size", 1, "--workers", 2)
    process = subprocess.Popen(command(*arguments), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(out.glob("train-*.tar")):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate()
    assert process.returncode == 130
    assert messages.endswith("interrupted; the same command goes on, finished shards are kept\n")
    assert run(*arguments).returncode == 0


def test_a_disk_that_refuses(folders, written, files_of, tmp_path):
    source = folders(tmp_path / "many", classes=2, images=40)
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    arguments = ("folder", source, out, "--split", "train", "--shard-size", 40)
    limit = 50_000
    process = run(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert process.returncode == 2
    assert "error: cannot write " in process.stderr
    assert ".tar: File too large (" in process.stderr
    assert "Make room or choose another directory, then run the same command again." in process.stderr
    assert not [name for name in files_of(out) if name.endswith((".tar", ".tmp"))]
    assert run(*arguments).returncode == 0
    written(source, undisturbed, shard_size=40)
    assert files_of(out) == files_of(undisturbed)


def test_a_terminal_gets_a_bar(source, tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    arguments = command("folder", source, tmp_path / "out", "--split", "train")
    subprocess.run(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs, check=True)
    os.close(theirs)
    assert b"writing: " in b"".join(until_hung_up(ours))


def until_hung_up(terminal):
    with open(terminal, "rb", buffering=0) as screen, contextlib.suppress(OSError):
        while True:
            yield screen.read(4096)


def test_a_log_gets_plain_lines(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS_A_LINE", 0.0)
    with progress.Progress("train", 2) as images:
        images.advance()
        images.advance()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["train: 1/2 images", "train: 2/2 images"]
    assert lines[1].endswith(" images/s, 0 s left")


def test_help_explains_each_option():
    text = run("folder", "--help").stdout
    for part in ("SOURCE", "OUT", "--split", "--shard-size", "--seed", "default: 5000", "0.01%"):
        assert part in text
