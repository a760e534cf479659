"""The best evaluation: by which head, of which step, and its weights on disk."""

import json
from pathlib import Path

import pytest
import ranks
from safetensors import safe_open

from pipeline.best import Best

LINES = [
    {"step": 1, "loss": 3.0},
    {"step": 1, "split": "val", "memory_top1": 0.5, "process_top1": 0.9, "ema_memory_top1": 0.1},
    {"step": 2, "split": "val", "memory_top1": 0.5, "process_top1": 0.1, "ema_memory_top1": 0.2},
    {"step": 3, "split": "val", "memory_top1": 0.4, "process_top1": 1.0, "ema_memory_top1": 0.1},
]


def test_the_memory_head_decides_and_a_tie_goes_to_the_earlier():
    best = Best.of(("process", "memory"), LINES)
    assert best.steps() == {"best_step": 1, "ema_best_step": 2}
    better = best.add(4, {"memory_top1": 0.6, "ema_memory_top1": 0.2})
    assert better == {"model": (4, "memory_top1", 0.6)}
    assert best.steps() == {"best_step": 4, "ema_best_step": 2}


def test_a_model_with_one_head_and_no_average():
    best = Best.of(("head",), [])
    assert best.steps() == {}
    assert best.add(1, {"head_top1": 0.0}) == {"model": (1, "head_top1", 0.0)}
    assert best.steps() == {"best_step": 1}


def test_a_run_keeps_its_best_weights_and_says_of_which_step_they_are(start, small, tmp_path):
    options = ["--debug", *small, "--run-dir", str(tmp_path), "--evaluation.every", "1 steps", "--schedule.lr", "0.004"]
    options += ["--augment.no-mixup", "--augment.randaugment-ops", "0"]
    ended = start("recipes/pretrain_21k.py", options).wait()
    assert ended.codes == [0], ended.outputs
    evaluations = [line for line in ranks.metrics(tmp_path) if "split" in line]
    for prefix, name in (("", "model"), ("ema_", "ema")):
        scores = [line[f"{prefix}memory_top1"] for line in evaluations]
        assert [line[f"{prefix}best_step"] for line in evaluations] == [
            scores.index(max(scores[: count + 1])) + 1 for count in range(len(scores))
        ]
        told = {"step": scores.index(max(scores)) + 1, f"{prefix}memory_top1": max(scores)}
        assert json.loads(metadata(tmp_path / "weights" / f"best_{name}.safetensors")["best"]) == told
    assert metadata(tmp_path / "weights" / "model.safetensors") == {"format": "pt"}
    raw = [line["best_step"] for line in evaluations]
    assert len(set(raw)) > 1, "the figures above would agree if the first evaluation were always the best"


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("lines", [0, 1, 2, 3])
def test_a_resumed_run_judges_by_the_lines_that_it_keeps(lines):
    kept = Best.of(("memory",), LINES[:lines])
    for line in LINES[lines:]:
        if "split" in line:
            kept.add(line["step"], line)
    assert kept == Best.of(("memory",), LINES)
