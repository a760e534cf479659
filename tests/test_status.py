"""tools/status.py: how runs stand, on real ones that are done, go on, stop, are killed and die; and without torch."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
import ranks

from pipeline.record import read_metrics
from pipeline.status.state import out_of_memory
from pipeline.status.words import clock, duration, large
from tools.status import main

PRETRAIN = "recipes/pretrain_21k.py"


def status_of(capsys, *paths) -> tuple[int, list[dict]]:
    """The exit code, and what is told of each run."""
    code = main([*map(str, paths), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_finished_chain(finished, capsys):
    code, (chain, pretrain, finetune, *others) = status_of(capsys, finished)
    assert code == 0
    assert (chain["chain"], chain["state"], chain["why"]) == (str(finished), "done", "every stage is finished")
    assert chain["stages"] == 2 + len(others)
    for name, entry in (("pretrain", pretrain), ("finetune", finetune)):
        assert (entry["name"], entry["state"], entry["step"], entry["total"]) == (name, "done", 8, 8)
        assert entry["commit"]["step"] == 8
        assert (entry["quarantined"], entry["skipped"], entry["attempts"]) == (0, 0, 1)
        assert entry["seconds_left"] is None
    top1 = [line for line in read_metrics(finished / "pretrain") if "split" in line]
    assert pretrain["best"]["value"] == max(line[f"{kind}memory_top1"] for line in top1 for kind in ("", "ema_"))
    assert main([str(finished / "finetune")]) == 0
    told = capsys.readouterr().out
    assert told.startswith(
        f"{finished}/finetune: done\n  why     trained for 8 steps\n  step    8 of 8 (100.0%), epoch"
    )
    assert re.search(r"\n  commit  step 8, .* ago\n", told)


def test_a_run_that_goes_on_is_killed_and_dies(start, small, tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    options = ["--debug", *small, "--schedule.length", "4000 steps", "--evaluation.every", "100%"]
    options += ["--data.max-bad", "1%", "--runtime.no-pictures", "--run-dir", str(run)]
    running = start(PRETRAIN, options)
    ranks.when_logged(run / "metrics.jsonl", 5, running.processes[0].is_alive)
    code, (entry,) = status_of(capsys, run)
    assert (code, entry["state"], entry["why"], entry["total"]) == (0, "running", "", 4000)
    assert 5 <= entry["step"] < 4000
    assert entry["seconds_left"] > 0
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("*.tmp", "checkpoints"))
    log = other / "logs" / "rank-0.log"
    log.write_text(log.read_text().replace(f"on {socket.gethostname()}", "on another-machine"))
    assert status_of(capsys, other)[1][0]["state"] == "running", "it wrote a moment ago"
    running.kill()
    code, (entry,) = status_of(capsys, run)
    assert (code, entry["state"]) == (1, "dead")
    assert re.match(
        r"no rank left a word: killed as a whole \(kill -9, .*\), it last wrote \d+ s ago; the end of ", entry["why"]
    )
    assert "'step " in entry["why"], "the last line of its log"
    for file in other.rglob("*"):
        os.utime(file, (1e9, 1e9))
    code, (entry,) = status_of(capsys, other)
    assert (code, entry["state"]) == (1, "dead")
    assert "from another-machine: the processes, that machine or the way there is gone" in entry["why"]

    again = start(PRETRAIN, options)
    ranks.when_logged(run / "attempts.jsonl", 2, again.processes[0].is_alive)
    os.kill(again.processes[0].pid, signal.SIGSEGV)
    again.wait()
    entry = status_of(capsys, run)[1][0]
    assert entry["state"] == "dead"
    assert entry["why"] == f"rank 0: Fatal Python error: Segmentation fault ({run}/logs/rank-0.log)"
    assert entry["attempts"] == 2


def test_a_run_that_was_stopped(start, small, tmp_path, capsys):
    options = ["--debug", *small, "--schedule.length", "4000 steps", "--evaluation.every", "100%"]
    running = start(PRETRAIN, [*options, "--runtime.no-pictures", "--run-dir", str(tmp_path / "run")])
    ranks.when_logged(tmp_path / "run" / "metrics.jsonl", 2, running.processes[0].is_alive)
    running.processes[0].terminate()
    assert running.wait().codes == [75]
    code, (entry,) = status_of(capsys, tmp_path / "run")
    assert (code, entry["state"]) == (0, "requeue")
    assert entry["why"] == "a signal asked the run to stop; start it again to go on"
    assert entry["commit"]["step"] == entry["step"]


def made(path: Path, head: str, lines: str = "") -> Path:
    """A run directory with a log that begins so."""
    (path / "logs").mkdir(parents=True)
    (path / "logs" / "rank-0.log").write_text(f"{head}\n{lines}")
    return path


def head(pid: int, when: float, host: str = "") -> str:
    told = datetime.fromtimestamp(when, UTC).isoformat(timespec="seconds")
    return f"=== {told}: rank 0 of 1, pid {pid} on {host or socket.gethostname()}, commit abc"


def test_a_number_that_another_process_has_now(tmp_path, capsys):
    own = psutil.Process()
    run = made(tmp_path / "mine", head(own.pid, own.create_time() + 5), "=== what a recipe itself prints ===\n")
    assert status_of(capsys, run)[1][0]["state"] == "running"
    run = made(tmp_path / "taken", head(own.pid, own.create_time() - 60))
    assert status_of(capsys, run)[1][0]["state"] == "dead"


def test_a_machine_that_was_started_again(tmp_path, capsys):
    run = made(tmp_path / "run", head(2**22 + 1, psutil.boot_time() - 3600))
    why = status_of(capsys, run)[1][0]["why"]
    assert why.startswith(f"{socket.gethostname()} was started again at {clock(psutil.boot_time())[:10]}")


def test_the_last_error_in_a_log(tmp_path, capsys):
    lines = "RuntimeError: of an earlier attempt\n" + head(2**22 + 1, psutil.boot_time() + 1) + "\nTraceback (most:\n"
    run = made(tmp_path / "run", head(1, 0), lines + "torch.OutOfMemoryError: CUDA out of memory. Tried\n  more\n")
    why = status_of(capsys, run)[1][0]["why"]
    assert why == f"rank 0: torch.OutOfMemoryError: CUDA out of memory. Tried ({run}/logs/rank-0.log)"


def test_memory_that_ran_out():
    log = """[1.0] Out of memory: Killed process 411 (python) total-vm:1kB
[2.0] Memory cgroup out of memory: Killed process 412 (pt_main_thread) total-vm:22kB
[3.0] oom_reaper: reaped process 412"""
    assert out_of_memory(log, [7, 412]) == log.splitlines()[1]
    assert out_of_memory(log, [41]) == out_of_memory(log, []) == out_of_memory("", [412]) == ""


def test_a_stage_whose_chain_ended(finished, tmp_path, capsys):
    """Errors and stops are told by the chain's outcome; stages to come wait."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "finetune" / "outcome.json").unlink()
    stages = [{"name": name} for name in ("pretrain", "finetune", "later")]
    (tmp_path / "chain.json").write_text(json.dumps({"stages": stages}))
    (tmp_path / "outcome.json").write_text('{"outcome": "error", "step": 1, "reason": "the disk is full"}')
    code, entries = status_of(capsys, tmp_path)
    assert code == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "outcome.json").write_text(json.dumps({"outcome": "error", "reason": "a\x1b[2Jb\nc"}))
    assert main([str(tmp_path / "other")]) == 1
    assert capsys.readouterr().out.splitlines()[1:3] == [r"  why     a\x1b[2Jb", "          c"]
    assert [entry["state"] for entry in entries] == ["error", "done", "error", "waiting"]
    assert entries[2]["why"] == "the disk is full"
    (tmp_path / "outcome.json").unlink()
    code, entries = status_of(capsys, tmp_path)
    assert [entry["state"] for entry in entries] == ["dead", "done", "dead", "waiting"]


def test_a_directory_of_runs_that_no_launch_has_as_its_stages(finished, tmp_path, capsys):
    """It is not dead because it keeps no logs of its own."""
    for name in ("a", "b"):
        shutil.copytree(finished / "pretrain", tmp_path / name)
    assert status_of(capsys, tmp_path)[1][0]["state"] == "done"
    (tmp_path / "b" / "outcome.json").write_text('{"outcome": "requeue", "step": 4, "reason": "a signal"}')
    for file in tmp_path.rglob("*"):
        os.utime(file, (1e9, 1e9))
    code, entries = status_of(capsys, tmp_path)
    assert (code, [entry["state"] for entry in entries]) == (0, ["requeue", "done", "requeue"])
    assert entries[0]["why"] == "b"
    made(tmp_path / "c", head(os.getpid(), psutil.Process().create_time() + 5))
    (tmp_path / "c" / "recipe.json").write_text("{}")
    assert status_of(capsys, tmp_path)[1][0] == {"chain": str(tmp_path), "stages": 3, "state": "running", "why": "c"}


def test_a_stage_from_within_its_directory(finished, tmp_path, capsys, monkeypatch):
    """Its logs are its chain's."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "finetune" / "outcome.json").unlink()
    (tmp_path / "outcome.json").write_text('{"outcome": "error", "step": 1, "reason": "the disk is full"}')
    monkeypatch.chdir(tmp_path / "finetune")
    (entry,) = status_of(capsys, ".")[1]
    assert (entry["state"], entry["why"]) == ("error", "the disk is full")


def test_what_is_no_run(tmp_path, capsys):
    assert main([str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/gone is no run: give a directory that a recipe wrote as its --run-dir, or a chain's\n"
    )


def test_it_does_without_torch(finished):
    check = "import sys, tools.status; code = tools.status.main(sys.argv[1:]); sys.exit(code or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check, finished], cwd=ranks.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (200_000, "2 d 7 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(12_345, "12,345"), (1_281_167, "1.28 M"), (3.6e15, "3.6 P"), (5e21, "5,000 E"), (0.2, "0")]
)
def test_large_numbers(number, text):
    assert large(number) == text
