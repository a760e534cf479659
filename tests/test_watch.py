"""A rank that stops, dies or goes its own way is named; what each rank printed, and where it stood, is kept."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import ranks

from pipeline.backend import World
from pipeline.launch import launch
from pipeline.prepare import prepare
from pipeline.recipe import parse
from pipeline.trainer import train
from recipes import pretrain_21k

PRETRAIN = "recipes/pretrain_21k.py"
LONG = ["--schedule.length", "4000 steps", "--evaluation.every", "100%", "--checkpoint.every", "100%"]


@pytest.fixture
def training(start, small, tmp_path):
    """training(*options) -> two ranks, three steps into a run of minutes in tmp_path / "run"."""

    def begin(*options: str) -> ranks.Ranks:
        run = ["--debug", *small, *LONG, "--run-dir", str(tmp_path / "run"), *options]
        running = start(PRETRAIN, run, 2)
        metrics = tmp_path / "run" / "metrics.jsonl"
        ranks.when_logged(metrics, 3, lambda: all(process.is_alive() for process in running.processes))
        return running

    return begin


def reason_of(run_dir: Path) -> str:
    outcome = json.loads((run_dir / "outcome.json").read_text())
    assert outcome["outcome"] == "error"
    return outcome["reason"]


def test_a_stopped_rank_is_named_by_the_other(training, tmp_path):
    running = training("--runtime.hang-timeout", "1")
    stopped = running.processes[1]
    os.kill(stopped.pid, signal.SIGSTOP)
    running.processes[0].join(ranks.PATIENCE)
    reason = reason_of(tmp_path / "run")
    print(reason)
    assert running.processes[0].exitcode == 1
