"""`make soak`: runs that are killed, or asked to stop, twenty times over at random moments: the run that never was.

A drill's seed is printed; PYTEST_DRILL_SEED repeats it, as far as moments can be repeated.
"""

import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import ranks
from strategies import place, recipe_of

from pipeline.trainer import fit, launch

pytestmark = pytest.mark.soak
STRATEGIES = ("ddp", "fsdp", "zero2")  # the first two commit behind the training
TIMES, STEPS, SAVED, EVALUATED = 20, 240, 4, 6
KINDS = ["start"] * 3 + ["any"] * 7 + ["saving"] * 5 + ["evaluation"] * 5  # of moments that are aimed at
TIME_TO_STOP = 25.0
POLL = 0.001
OPTIONS = ["--model.drop-path-rate", "0.2", "--data.accumulation", "1", "--evaluation.batch", "2"]
OPTIONS += ["--checkpoint.every", f"{SAVED} steps", "--evaluation.every", f"{EVALUATED} steps"]
WEIGHTS = [Path("weights") / f"{name}.safetensors" for name in ("model", "ema", "best_model", "best_ema")]


def train(strategy: str, data: Path, run_dir: Path) -> None:
    """What a launcher's child does."""
    recipe = recipe_of(data, run_dir, STEPS, OPTIONS)
    launch(lambda world: fit(recipe, place(world, strategy, run_dir.parent)), recipe.runtime, run_dir)


@dataclass(frozen=True)
class Attempt:
    """One start of a run's two ranks."""

    running: ranks.Ranks
    run_dir: Path
    newest: int
    """Step of the newest committed checkpoint before it."""

    @classmethod
    def begin(cls, strategy: str, data: Path, run_dir: Path) -> "Attempt":
        newest = committed(run_dir)
        running = ranks.run_function(train, (strategy, data, run_dir), run_dir.parent / "logs", 2)
        for log in running.logs:
            log.touch()  # a rank that is killed at once has not
        return cls(running, run_dir, newest)

    def until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            alive = all(process.is_alive() for process in self.running.processes)
            assert alive, "\n".join(log.read_text() for log in self.running.logs)
            threading.Event().wait(POLL)

    def listens(self) -> bool:
        """Whether both ranks have begun to catch SIGTERM."""
        found = [Path(f"/proc/{process.pid}/status").read_text() for process in self.running.processes]
        masks = [int(re.search(r"SigCgt:\t(\w+)", text)[1], 16) for text in found]
        return all(mask >> (signal.SIGTERM - 1) & 1 for mask in masks)

    def is_told(self) -> bool:
        """Whether it has said where it goes on from."""
        return bool(re.search(r"steps \d+ to", self.running.logs[0].read_text()))

    def has_logged(self, more: int) -> bool:
        """Whether so many steps are logged beyond the checkpoint that it went on from."""
        return self.is_told() and last_step(self.run_dir) >= self.newest + more

    def is_saving(self) -> bool:
        return any((self.run_dir / "checkpoints").glob("*.tmp"))

    def is_evaluating(self) -> bool:
        last = (lines_of(self.run_dir) or [{"step": -1}])[-1]
        return last["step"] % EVALUATED == 0 and "split" not in last

    def where(self) -> str:
        if not self.is_told():
            return "starting"
        doing = "evaluating" if self.is_evaluating() else "training"
        return f"{doing}, a commit under way" if self.is_saving() else doing

    def check_start(self) -> None:
        """It went on from the newest checkpoint that was committed, and from nothing else."""
        told = re.search(r"steps (\d+) to", self.running.logs[0].read_text())
        assert told is None or int(told[1]) == self.newest, f"{told[0]}, but {self.newest} was the newest committed"


def await_moment(attempt: Attempt, kind: str, moments: random.Random, is_kill: bool) -> None:
    """One of its start, any, one while it saves, or one while it evaluates; and a moment later."""
    if kind == "start":
        if not is_kill:  # before that a SIGTERM ends a process, as it ends any other
            attempt.until(attempt.listens)
        time.sleep(moments.uniform(0, 2))
        return
    more = moments.randint(1, 5)
    attempt.until(lambda: attempt.has_logged(more))
    if kind == "saving":
        attempt.until(attempt.is_saving)
    elif kind == "evaluation":
        attempt.until(attempt.is_evaluating)
    time.sleep(moments.uniform(0, 0.2 if kind == "any" else 0.02))


def committed(run_dir: Path) -> int:
    found = (run_dir / "checkpoints").glob("step-*/COMMITTED")
    return max((int(path.parent.name[5:]) for path in found if path.parent.suffix != ".tmp"), default=0)


def lines_of(run_dir: Path) -> list[dict]:
    """Its metrics, but for a line that is being written."""
    path = run_dir / "metrics.jsonl"
    texts = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(text) for text in texts if text.endswith("\n")]


def last_step(run_dir: Path) -> int:
    return max((line["step"] for line in lines_of(run_dir)), default=0)


@pytest.fixture(scope="module", params=STRATEGIES)
def whole(request, shards, tmp_path_factory) -> tuple[str, Path]:
    """A strategy, and its run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp(request.param) / "whole"
    finish(request.param, shards, run_dir)
    return request.param, run_dir


def finish(strategy: str, data: Path, run_dir: Path) -> None:
    attempt = Attempt.begin(strategy, data, run_dir)
    ended = attempt.running.wait()
    assert ended.codes == [0, 0], "\n".join(ended.outputs)
    attempt.check_start()


def check_same(run_dir: Path, whole: Path) -> None:
    assert ranks.metrics(run_dir) == ranks.metrics(whole)
    for weights in WEIGHTS:
        assert (run_dir / weights).read_bytes() == (whole / weights).read_bytes()


def seeded(name: str, strategy: str) -> random.Random:
    seed = int(os.environ.get("PYTEST_DRILL_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"\n{strategy}, {TIMES} x {name}: PYTEST_DRILL_SEED={seed}")
    return random.Random(seed)


def test_killed_twenty_times(whole, shards, tmp_path):
    strategy, undisturbed = whole
    moments, hit, left = seeded("SIGKILL", strategy), Counter(), 0
    for kind in moments.sample(KINDS, TIMES):
        attempt = Attempt.begin(strategy, shards, tmp_path / "run")
        await_moment(attempt, kind, moments, is_kill=True)
        hit[attempt.where()] += 1
        for process in moments.sample(attempt.running.processes, 2):
            process.kill()
        ended = attempt.running.wait()
        assert -signal.SIGKILL in ended.codes, "\n".join(ended.outputs)
        attempt.check_start()
        left += attempt.is_saving()
        assert json_outcome(tmp_path / "run") not in ("done", "requeue")
    finish(strategy, shards, tmp_path / "run")
    print(f"{strategy}: killed while {dict(hit)}; {left} left an uncommitted directory, of which none was loaded")
    check_kinds(hit)
    check_same(tmp_path / "run", undisturbed)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))


def test_stopped_twenty_times(whole, shards, tmp_path):
    strategy, undisturbed = whole
    moments, hit, took = seeded("SIGTERM", strategy), Counter(), []
    for kind in moments.sample(KINDS, TIMES):
        attempt = Attempt.begin(strategy, shards, tmp_path / "run")
        await_moment(attempt, kind, moments, is_kill=False)
        hit[attempt.where()] += 1
        logged = last_step(tmp_path / "run")
        began = time.monotonic()
        for process in moments.sample(attempt.running.processes, moments.randint(1, 2)):
            process.terminate()
        ended = attempt.running.wait()
        took.append(time.monotonic() - began)
        assert ended.codes == [75, 75], "\n".join(ended.outputs)
        attempt.check_start()
        outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
        assert outcome["outcome"] == "requeue"
        assert outcome["step"] == committed(tmp_path / "run") == last_step(tmp_path / "run")
        assert outcome["step"] >= max(logged, attempt.newest), "a step was lost"
    finish(strategy, shards, tmp_path / "run")
    median, longest = sorted(took)[TIMES // 2], max(took)
    print(f"{strategy}: stopped while {dict(hit)}; seconds to exit: median {median:.2f}, longest {longest:.2f}")
    assert longest < TIME_TO_STOP
    check_kinds(hit)
    check_same(tmp_path / "run", undisturbed)


def check_kinds(hit: Counter) -> None:
    for kind in ("starting", "training", "evaluating", "a commit under way"):
        assert any(kind in where for where in hit), f"nothing was hit while {kind}"


def json_outcome(run_dir: Path) -> str:
    path = run_dir / "outcome.json"
    return json.loads(path.read_text())["outcome"] if path.exists() else ""
