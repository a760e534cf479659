"""The command itself, as a process: exit codes, messages, kills and a disk that refuses."""

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
    assert first.stdout.startswith("train: 21 images, 3 classes, 5 shards, ")
    assert first.stdout.endswith(" s\n")
    assert "images/s" in first.stdout
    assert second.stdout.startswith("train: already complete: 21 images")
    assert first.stderr == second.stderr == ""
    assert Index.load(tmp_path / "out").split("train").made_from["seed"] == 3


@pytest.mark.parametrize("damage", ["missing", "empty class", "bad image"])
def test_bad_input_exits_with_2(source, tmp_path, damage):
    if damage == "missing":
        source, text = tmp_path / "nowhere", "nowhere does not exist"
    elif damage == "empty class":
        (source / "c9").mkdir()
        text = "c9 has no images"
    else:
        (source / "c0/x.jpg").write_bytes(b"")
        text = "x.jpg: the file is empty"
    process = run("folder", source, tmp_path / "out", "--split", "train")
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert text in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("shards_before_the_kill", [0, 40])
def test_a_killed_run_leaves_nothing_whole_and_is_redone(folders, written, files_of, tmp_path, shards_before_the_kill):
    source = folders(tmp_path / "many", classes=4, images=40)
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    arguments = ("folder", source, out, "--split", "train", "--shard-size", 1)
    process = subprocess.Popen(command(*arguments), cwd=ROOT)
    while not (out / f"train-{shards_before_the_kill:06d}.tar").exists():
        assert process.poll() is None
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (out / "train-000159.tar.123.tmp").write_bytes(b"as if killed inside the last shard")
    with pytest.raises(UserError, match="has no index"):
        Index.load(out)
    # Other options: shards of the first run that the second does not write must not stay.
    written(source, undisturbed, shard_size=50)
    written(source, out, shard_size=50)
    assert files_of(out) == files_of(undisturbed)


def test_a_disk_that_refuses(folders, written, files_of, tmp_path):
    source = folders(tmp_path / "many", classes=2, images=40)
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    arguments = ("folder", source, out, "--split", "train", "--shard-size", 40)
    limit = 50_000
    process = run(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert process.returncode == 2
    assert "error: cannot write " in process.stderr
    assert "train-000000.tar: File too large" in process.stderr
    assert "Make room or choose another directory, then run the same command again." in process.stderr
    assert set(files_of(out)) == {".lock", "train.unfinished"}
    assert run(*arguments).returncode == 0
    written(source, undisturbed, shard_size=40)
    assert files_of(out) == files_of(undisturbed)


def test_a_terminal_gets_a_bar(source, tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    arguments = command("folder", source, tmp_path / "out", "--split", "train")
    subprocess.run(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs, check=True)
    os.close(theirs)
    with open(ours, "rb", buffering=0) as terminal:
        assert b"train: " in terminal.read(4096)


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
    for part in ("SOURCE", "OUT", "--split", "--shard-size", "--seed", "default: 5000"):
        assert part in text
