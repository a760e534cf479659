"""A signal at any moment of a run: it ends in order, soon, and is to be started again."""

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
import ranks

from pipeline.backend import Place, World, start
from pipeline.data.batch import Request
from pipeline.launch import launch
from pipeline.prepare import prepare
from pipeline.recipe import parse
from pipeline.trainer import fit, leave, train
from recipes import pretrain_21k

TIME_TO_STOP = 25.0
MOMENTS = (  # in this order: the run goes on from one to the next
    ("opening the data", 0),
    ("building the model", 0),
    ("warming up, pass 2", 0),
    ("step 1: training", 0),  # its poll sees the signal
    ("step 2: saving a checkpoint", 2),
    ("restoring step-00000002", 2),
    ("evaluation: waiting for batch 2", 4),
    ("evaluation: batch 1", 4),  # before the first step of an attempt that begins with an evaluation
    ("step 6: waiting for data", 5),
)


class Signalling(Place):
    """Sends the process a SIGTERM, and another one, where it comes to `label`."""

    def __init__(self, label: str) -> None:
        self.awaited, self.signalled = label, 0.0
        super().__init__()

    def at(self, label: str) -> None:
        super().at(label)
        if label == self.awaited:
            self.signalled = time.monotonic()
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)


def left(world: World, place: Signalling, root: Path) -> list:
    """Seconds since the signal, and the outcome; then nothing has been signalled."""
    seconds = time.monotonic() - place.signalled
    world.barrier()
    outcome = json.loads((root / "run" / "outcome.json").read_text())
    world.stop.raised = False
    world.barrier()
    return [seconds, outcome]


def stop_at_each(options: list[str], root: Path) -> None:
    """Rank 1 is signalled; the last time both are, while they wait for data that never comes."""
    world = start("cpu")
    recipe = parse(pretrain_21k.make, pretrain_21k.MODELS, "", ["--debug", *options])
    found = []
    for label, _ in MOMENTS:
        place = Signalling(label if world.rank == 1 else "nowhere")
        assert fit(recipe, dataclasses.replace(world, place=place)) == "requeue"
        found.append(left(world, place, root))
    place = Signalling("nowhere")
    run = prepare(recipe, dataclasses.replace(world, place=place))

    def never_come(request: Request, images: np.ndarray) -> NoReturn:
        place.signalled = time.monotonic()
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        threading.Event().wait()
        raise AssertionError("the signal ended the process's wait, but not its training's")

    run.input.stream.samples.fill = never_come
    assert train(run) == "requeue"
    found.append(left(world, place, root))
    if world.rank == 1:
        (root / "found.json").write_text(json.dumps(found))
    leave(0)


def hold_up(options: list[str]) -> None:
    """A launch whose only rank never comes to its first step, nor to an end of its own."""
    recipe = parse(pretrain_21k.make, pretrain_21k.MODELS, "", ["--debug", *options])

    def job(world: World) -> str:
        world.place.at("compiling")
        print("held up", flush=True)
        threading.Event().wait()
        return "done"

    launch(job, recipe.runtime, Path(recipe.run_dir))


def test_a_signal_while_held_up_before_the_first_step(small, tmp_path):
    """Nothing would be lost: the rank does not wait until it can agree with the others."""
    running = ranks.run_function(hold_up, ([*small, "--run-dir", str(tmp_path)],), tmp_path / "outputs", 1)
    log = tmp_path / "logs" / "rank-0.log"
    while not log.exists() or "held up" not in log.read_text():
        assert running.processes[0].is_alive()
        threading.Event().wait(ranks.POLL)
    for _ in range(2):
        running.processes[0].terminate()
    began = time.monotonic()
    assert running.wait().codes == [75]
    assert time.monotonic() - began < TIME_TO_STOP
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["step"]) == ("requeue", 0)
    assert "asked the run to stop before its first step, at 'compiling'" in outcome["reason"]


def test_a_signal_at_any_moment(small, tmp_path):
    options = [*small, "--run-dir", str(tmp_path / "run"), "--runtime.compile", "aot_eager"]
    ended = ranks.run_function(stop_at_each, (options, tmp_path), tmp_path / "outputs", 2).wait()
    assert ended.codes == [0, 0], "\n".join(ended.outputs)
    found = json.loads((tmp_path / "found.json").read_text())
    print(found)
    for (seconds, outcome), (label, step) in zip(found, (*MOMENTS, ("without data", 5)), strict=True):
        assert (outcome["outcome"], outcome["step"]) == ("requeue", step), label
        assert seconds < TIME_TO_STOP, label
