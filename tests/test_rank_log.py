"""RUN/logs/rank-N.log: what a rank prints is kept, whatever becomes of the disk and of the rank."""

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

import ranks

from pipeline.watch import keep_log


def speak(run_dir: Path) -> None:
    keep_log(run_dir)
    assert not sys.stderr.isatty()
    print("a line\nand half", end="")
    sys.stderr.write("\rbar 1\rbar 2")
    print(" a line", flush=True)
    sys.stderr.write("\r")
    print("told", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGUSR2)
    size = (run_dir / "logs" / "rank-0.log").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    print("beyond\nand more", flush=True)


def crash(run_dir: Path) -> None:
    keep_log(run_dir)
    ctypes.string_at(0)


def test_lines_are_kept_while_the_disk_takes_them(tmp_path):
    ended = ranks.run_function(speak, (tmp_path,), tmp_path / "outputs", 1).wait()
    assert ended.codes == [0], ended.outputs
    header, *lines = (tmp_path / "logs" / "rank-0.log").read_text().splitlines()
    assert header.startswith("=== 20")
    assert ": rank 0 of 1, pid " in header
    assert f" on {os.uname().nodename}, commit " in header
    assert lines[:3] == ["a line", "and half a line", "told"]
    assert lines[3].endswith("(most recent call first):")
    assert any("in speak" in line for line in lines[4:])
    assert "beyond\nand more\n" in ended.outputs[0]
    assert ended.outputs[0].count("rank-0.log takes no more ([Errno 27] File too large): the run goes on") == 1


def test_a_crash_leaves_its_stack(tmp_path):
    """In the log of the second attempt, below that of the first."""
    logs = [ranks.run_function(crash, (tmp_path,), tmp_path / "outputs", 1).wait() for _ in range(2)]
    assert [ended.codes for ended in logs] == [[-signal.SIGSEGV]] * 2
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert log.count(": rank 0 of 1, pid ") == 2
    assert log.count("Fatal Python error: Segmentation fault") == 2
    assert log.count("in crash\n") == 2
