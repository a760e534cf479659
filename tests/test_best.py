"""The best evaluation: by which head, of which step, and its weights on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.augment.device import normalise
from pipeline.augment.exact import EvalTransform
from pipeline.best import Best
from pipeline.models.build import make_model
from pipeline.recipe import Recipe, unflatten
from shards.index import Index
from shards.reader import Reader

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


def test_a_run_keeps_its_best_weights_and_says_of_which_step_they_are(finished):
    run = finished / "pretrain"
    evaluations = [line for line in ranks.metrics(run) if "split" in line]
    for prefix, name in (("", "model"), ("ema_", "ema")):
        scores = [line[f"{prefix}memory_top1"] for line in evaluations]
        best = [scores.index(max(scores[: count + 1])) + 1 for count in range(len(scores))]
        assert [line[f"{prefix}best_step"] for line in evaluations] == best
        path = run / "weights" / f"best_{name}.safetensors"
        assert json.loads(metadata(path)["best"]) == {"step": best[-1], f"{prefix}memory_top1": max(scores)}
        assert evaluate_again(run, path) == pytest.approx(max(scores))
    assert metadata(run / "weights" / "model.safetensors") == {"format": "pt"}
    raw = [line["best_step"] for line in evaluations]
    assert 1 < raw[-1] < len(raw), "neither the first nor the last, which a wrong rule might give as well"


def evaluate_again(run_dir: Path, weights: Path) -> float:
    """Top-1 of the memory head with a run's weights, without the trainer."""
    recipe = unflatten(json.loads((run_dir / "recipe.json").read_text()), Recipe)
    index = Index.load(recipe.data.path)
    model = make_model(recipe, index.num_classes).eval()
    model.load_state_dict(load_file(weights))
    reader, transform = Reader(index, "val"), EvalTransform.of(recipe)
    images, labels = zip(*(reader.read(number, transform) for number in range(len(reader))), strict=True)
    batch = normalise(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    return (model(batch).argmax(dim=1) == torch.tensor(labels)).double().mean().item()


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
