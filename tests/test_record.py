"""What a run leaves to be read."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.recipe import Recipe, flatten
from pipeline.record import check_same_recipe, forget_outcome, last_evaluation, last_step, read_outcome, write_outcome
from pipeline.record.record import Record
from shards.errors import UserError

VALUES = {"epoch": 0.5, "loss": 1.0, "lr": 0.1, "grad_norm": 2.0}


def write(run_dir, start, stop):
    record = Record(run_dir, is_main=True, global_batch=8)
    with record.open(start, 10):
        for step in range(start + 1, stop + 1):
            record.step(step)
            record.metrics(step, VALUES | {"loss": float(step)})
            if step % 2 == 0:
                record.evaluation(step, "val", {"memory_top1": step / 10})
        record.flush()


def lines(run_dir):
    return [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_record_goes_on_from_the_checkpoint(tmp_path):
    write(tmp_path, 0, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    write(tmp_path, 4, 6)
    found = [(line["step"], "split" in line) for line in lines(tmp_path)]
    # The evaluation of step 4 follows its checkpoint, so a run that resumes there makes it again.
    assert found == [(1, False), (2, False), (2, True), (3, False), (4, False), (5, False), (6, False), (6, True)]
    assert last_step(tmp_path) == 6
    assert last_evaluation(tmp_path) == {"step": 6, "split": "val", "memory_top1": 0.6}


def test_an_attempt_that_was_torn_is_forgotten(tmp_path):
    """As by a disk that was full: the next attempts are noted on lines of their own."""
    attempts = tmp_path / "attempts.jsonl"
    attempts.write_text('{"started": 1700000000.0, "st')
    write(tmp_path, 0, 2)
    write(tmp_path, 2, 3)
    assert [json.loads(line)["step"] for line in attempts.read_text().splitlines()] == [0, 2]


def test_tensorboard_shows_the_same_as_the_metrics(tmp_path):
    write(tmp_path, 0, 5)
    write(tmp_path, 4, 6)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(n, n) for n in range(1, 7)]
    assert {"train/lr", "train/grad_norm", "train/data_wait", "val/memory_top1"} <= set(board.Tags()["scalars"])


def test_other_ranks_write_nothing(tmp_path):
    record = Record(tmp_path, is_main=False, global_batch=8)
    with record.open(0, 10):
        record.step(1)
        record.metrics(1, VALUES)
        record.evaluation(1, "val", {})
        record.flush()
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_a_checkpoint_was_not_made_by():
    kept = flatten(Recipe())
    check_same_recipe(kept, Recipe(), "step-2")
    del kept["loss"]
    with pytest.raises(UserError) as error:
        check_same_recipe(kept, Recipe(seed=3, loss="bce"), "step-2")
    assert str(error.value).splitlines()[1:3] == [
        "  - seed: 0 there, 3 now",
        "  - loss: 'bce' now, and not known to the version that made it: go on with that one",
    ]


def test_outcomes(tmp_path):
    assert read_outcome(tmp_path) == {}
    assert last_step(tmp_path) == 0
    write_outcome(tmp_path / "run", "requeue", 3, "because")
    assert read_outcome(tmp_path / "run") == {"outcome": "requeue", "step": 3, "reason": "because"}
    forget_outcome(tmp_path / "run")
    forget_outcome(tmp_path / "run")
    assert read_outcome(tmp_path / "run") == {}
    for text in ("{", "[]"):
        (tmp_path / "outcome.json").write_text(text)
        with pytest.raises(UserError, match=r"outcome\.json is not the JSON that a run writes \(.*\): restore it from"):
            read_outcome(tmp_path)
