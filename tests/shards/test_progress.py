"""What a log and a terminal (a pseudo-terminal) get to see."""

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from shards import progress
from shards.progress import Progress

ROOT = Path(__file__).parents[2]


@pytest.fixture
def every_line(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_A_LINE", 0.0)


def lines_of(capsys):
    """Plain lines, with N for what depends on the clock."""
    return [re.sub(r"\d+ (images/s|MB/s|s left)", r"N \1", line) for line in capsys.readouterr().err.splitlines()]


def on_terminal(body):
    """What a terminal of 120 columns gets from a process, as text."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    command = [sys.executable, "-c", f"from shards.progress import Progress\n{body}"]
    subprocess.run(command, cwd=ROOT, stderr=theirs, check=True)
    os.set_blocking(ours, False)
    with open(ours, "rb", buffering=0) as terminal:
        text = terminal.read(1 << 16).decode()
    os.close(theirs)
    return text


def test_a_log_gets_a_line_with_all_that_is_known(every_line, capsys):
    with Progress("train", 3000, 5_900_000_000) as images:
        images.advance(1000, 1_400_000_000)
        images.advance(2000, 4_500_000_000)
    assert lines_of(capsys) == [
        "train: 1000/3000 images, 1.4/5.9 GB, N images/s, N MB/s, N s left",
        "train: 3000/3000 images, 5.9/5.9 GB, N images/s, N MB/s, N s left",
    ]


def test_an_advance_is_one_image_and_bytes_need_not_be_counted(every_line, capsys):
    with Progress("val", 2) as images:
        images.advance()
    assert lines_of(capsys) == ["val: 1/2 images, N images/s, N s left"]


def test_totals_may_be_unknown(every_line, capsys):
    with Progress("listing") as images:
        images.advance(7, 3)
    with Progress("listing", total_bytes=2_000_000_000) as images:
        images.advance(7, 1_000_000_000)
    assert lines_of(capsys) == [
        "listing: 7 images, N images/s, N MB/s",
        "listing: 7 images, 1.0/2.0 GB, N images/s, N MB/s, N s left",
    ]


def test_a_log_gets_a_line_every_ten_seconds_and_a_last_one(capsys):
    with Progress("train", 1000) as images:
        for _ in range(600):
            images.advance()
    with Progress("val", 10, initial=10):
        pass
    assert lines_of(capsys) == ["train: 600/1000 images, N images/s, N s left", "val: 10/10 images, N images/s"]


def test_a_failed_job_says_how_far_it_came(capsys):
    def fail_after(count):
        with Progress("train", 4) as images:
            images.advance(count)
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail_after(3)
    assert lines_of(capsys) == ["train: 3/4 images, N images/s, N s left"]


def test_rates_leave_out_what_an_earlier_run_did(capsys):
    with Progress("train", 10**15, initial=10**14) as images:
        images.advance(1, 50)
        rates = images.rates
    assert 0 < rates.images < 10**9
    assert rates.num_bytes == pytest.approx(50 * rates.images)
    assert capsys.readouterr().err.startswith(f"train: {10**14 + 1}/{10**15} images, ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99.4, "99 s"), (170, "3 min"), (6000, "2 h"), (10**6, "278 h")],
)
def test_durations_have_a_fitting_unit(seconds, text):
    assert progress._duration(seconds) == text


def test_a_terminal_gets_a_bar():
    text = on_terminal(
        "with Progress('train', 8, 4_000_000_000) as images:\n    for _ in range(4): images.advance(2, 1_000_000_000)\n"
    )
    last = text.strip().split("\r")[-1]
    assert re.fullmatch(r"train: 100%\|.*\| 8/8 \[00:00<00:00, *[\d.]+ images/s, 4\.0/4\.0 GB, \d+ MB/s\]\s*", last), (
        last
    )


def test_the_rate_of_a_bar_leaves_out_what_an_earlier_run_did():
    text = on_terminal("with Progress('train', 10**15, initial=5 * 10**14) as images: images.advance(2)")
    (rate,) = re.findall(r"([\d.]+) images/s", text.strip().split("\r")[-1])
    assert "train:  50%" in text
    assert float(rate) < 10**9
