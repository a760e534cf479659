"""A rank that stops, dies or goes its own way is named; what each rank printed, and where it stood, is kept."""

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import psutil
import pytest
import ranks
from torch import Tensor

from pipeline.backend import World
from pipeline.launch import launch
from pipeline.prepare import prepare
from pipeline.recipe import parse
from pipeline.trainer import train
from recipes import pretrain_21k

PRETRAIN = "recipes/pretrain_21k.py"
LONG = ["--schedule.length", "4000 steps", "--evaluation.every", "100%", "--checkpoint.every", "100%"]
STUCK_AT = 3
HANG = 10
"""Seconds, in which every start and step moves also on a machine that is busy."""


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
    assert outcome["step"] >= 2
    return outcome["reason"]


def check_logs(logs: Path, rank: int) -> None:
    """What trouble leaves of a rank that could still speak."""
    assert "in launch\n" in (logs / f"rank-{rank}.stacks").read_text()  # of the main thread
    recorded = json.loads((logs / f"rank-{rank}.flight.json").read_text())["gloo"]["entries"]
    assert recorded[-1]["profiling_name"] == "gloo:all_reduce"


def test_a_stopped_rank_is_named_by_the_other(training, tmp_path):
    running = training("--runtime.hang-timeout", str(HANG))
    os.kill(running.processes[1].pid, signal.SIGSTOP)
    running.processes[0].join(ranks.PATIENCE)
    assert running.processes[0].exitcode == 1
    reason = reason_of(tmp_path / "run")
    assert reason.startswith(f"hang: nothing has moved for {HANG} s; rank 1 did not arrive: rank 1 (pid ")
    assert f"(pid {running.processes[1].pid} on {os.uname().nodename}) is stopped (SIGSTOP); rank 0 stands at" in reason
    assert "from sum (pipeline/backend/world.py:" in reason
    assert "start the same command again" in reason
    check_logs(tmp_path / "run" / "logs", 0)
    assert f"error: {reason}\n" in running.logs[0].read_text()


def test_a_dead_rank_is_named_by_the_other(training, tmp_path):
    running = training()
    running.processes[1].kill()
    ended = running.wait()
    assert ended.codes == [1, -signal.SIGKILL]
    reason = reason_of(tmp_path / "run")
    assert reason.startswith("a collective failed; rank 1 did not arrive: rank 1 (pid ")
    assert "is dead (killed? the kernel's log tells of memory that ran out); rank 0 stands at 'step " in reason
    assert "gloo" not in reason.partition("; rank 0")[0]
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert "RuntimeError: [/pytorch/third_party/gloo/" in log  # closed, or reset by the peer
    assert f"error: {reason}\n" in log
    check_logs(tmp_path / "run" / "logs", 0)


def get_stuck(options: list[str]) -> None:
    """A run in which rank 1 never comes out of its own code again."""
    recipe = parse(pretrain_21k.make, pretrain_21k.MODELS, "", ["--debug", *options])

    def job(world: World) -> str:
        run = prepare(recipe, world)
        criterion, calls = run.learner.criterion, []

        def stuck(outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
            calls.append(len(calls))
            if world.rank == 1 and len(calls) == STUCK_AT:
                print("rank 1 goes its own way", flush=True)
                threading.Event().wait()
            return criterion(outputs, targets)

        object.__setattr__(run.learner, "criterion", stuck)
        return train(run)

    launch(job, recipe.runtime, Path(recipe.run_dir))


def test_a_rank_in_its_own_code_is_named_with_its_place(small, tmp_path):
    options = [*small, *LONG, "--run-dir", str(tmp_path), "--runtime.hang-timeout", str(HANG)]
    ended = ranks.run_function(get_stuck, (options,), tmp_path / "outputs", 2).wait()
    assert ended.codes == [1, 1]
    reason = reason_of(tmp_path)
    assert reason.startswith(f"hang: nothing has moved for {HANG} s; rank 1 did not arrive: rank 1 (pid ")
    assert f"is still at 'step {STUCK_AT}: training'; rank 0 stands at 'step {STUCK_AT}: training', in gloo:" in reason
    stacks = [(tmp_path / "logs" / f"rank-{rank}.stacks").read_text() for rank in (0, 1)]
    assert "in all_reduce\n" in stacks[0]
    assert "in stuck\n" in stacks[1]
    check_logs(tmp_path / "logs", 0)
    logs = [(tmp_path / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    assert "rank 1 goes its own way\n" in logs[1]
    assert "step 2/4000  loss" in logs[0]
    for rank, log in enumerate(logs):
        assert f": rank {rank} of 2, pid " in log.splitlines()[0]
        assert "error: " in log
    assert sum(f"error: {reason}\n" in output for output in ended.outputs) == 1


def kill_a_rank(launcher: subprocess.Popen) -> None:
    (_, second) = sorted(psutil.Process(launcher.pid).children(), key=lambda rank: rank.environ()["RANK"])
    second.kill()


@pytest.mark.soak
def test_a_launcher_that_ends_the_others_leaves_them_time_to_tell(small, tmp_path):
    """torchrun, which accelerate launch is, sends a SIGTERM to the ranks that are left."""
    run, log = ["--debug", *small, *LONG, "--run-dir", str(tmp_path / "run")], tmp_path / "launch.log"
    launcher = ranks.accelerate("ddp_cpu2", PRETRAIN, run, log)
    ranks.when_logged(tmp_path / "run" / "metrics.jsonl", 3, lambda: launcher.poll() is None)
    kill_a_rank(launcher)
    assert launcher.wait(ranks.PATIENCE) == 1
    reason = reason_of(tmp_path / "run")
    assert reason.startswith("a collective failed; rank 1 did not arrive: rank 1 (pid ")
    assert f"error: {reason}\n" in log.read_text()
