"""Bad samples under a run: named, counted over all ranks, replaced within the budget, and a stop beyond it."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from pipeline.backend.world import World
from pipeline.data.batch import Batch, Replaced
from pipeline.data.loading import Loading
from pipeline.data.quarantine import Quarantine
from pipeline.prepare import make_input
from pipeline.recipe import Augment, Data, Recipe
from shards.errors import UserError
from shards.index import Index
from shards.reader import BadSample
from shards.store import open_data

PRETRAIN = "recipes/pretrain_21k.py"


@pytest.fixture
def damaged(shards, tmp_path):
    """damaged(train, val) -> a copy of the shards in which the images of these samples are zeros."""

    def make(train: list[int], val: list[int]) -> str:
        root = tmp_path / "damaged"
        shutil.copytree(shards, root)
        for split, samples in (("train", train), ("val", val)):
            blank(Index.load(root), split, samples)
        return str(root)

    return make


def blank(index: Index, split: str, samples: list[int]) -> None:
    rows = index.offsets(split)
    ends = np.cumsum([shard.num_samples for shard in index.split(split).shards])
    for sample in samples:
        shard = index.split(split).shards[np.searchsorted(ends, sample, side="right")]
        with open(index.root / shard.name, "r+b") as file:
            file.seek(int(rows[sample]["offset"]))
            file.write(bytes(int(rows[sample]["size"])))


def quarantined(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]


def test_a_run_within_its_budget(start, small, damaged, tmp_path):
    options = ["--debug", *small, "--data.path", damaged([3, 70], [5]), "--data.workers", "1", "--data.max-bad", "2"]
    options += ["--run-dir", str(tmp_path / "run")]
    ended = start(PRETRAIN, options, 2).wait()
    assert ended.codes == [0, 0], "\n".join(ended.outputs)
    lines = quarantined(tmp_path / "run")
    assert sorted((line["split"], line["sample"]) for line in lines) == [("train", 3), ("train", 70), ("val", 5)]
    for line in lines:
        assert line["key"].startswith("c")
        assert line["shard"].endswith(".tar")
        assert "cannot decode an image" in line["reason"]
        assert (line["substitute"] is None) == (line["split"] == "val")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["unreadable"] for line in metrics if "split" in line] == [1.0, 1.0]
    assert "(1 images are unreadable and count as wrong: quarantine.jsonl)" in ended.outputs[0]


def test_a_run_beyond_its_budget_stops_with_the_list(start, small, damaged, tmp_path):
    options = ["--debug", *small, "--data.path", damaged(list(range(0, 80, 8)), []), "--data.max-bad", "1%"]
    options += ["--run-dir", str(tmp_path / "run"), "--data.workers", "1"]
    ended = start(PRETRAIN, options, 2).wait()
    assert ended.codes == [2, 2], "\n".join(ended.outputs)
    reason = json.loads((tmp_path / "run" / "outcome.json").read_text())["reason"]
    lines = quarantined(tmp_path / "run")
    assert f"{len(lines)} samples of split 'train' are bad, and data.max_bad allows 0" in reason
    assert all(f"{line['shard']}: {line['key']}: " in reason for line in lines)
    assert not (tmp_path / "run" / "weights").exists()


def test_substitutes_do_not_depend_on_the_world(damaged, small):
    path = damaged([3, 20, 21, 70], [])
    whole, parts = (delivered(path, size, workers) for size, workers in ((1, 0), (4, 1)))
    for expected, found in zip(whole, parts, strict=True):
        assert torch.equal(expected, found)


def delivered(path: str, size: int, workers: int) -> list[torch.Tensor]:
    """Images, labels and (planned, substitute) of an epoch, put together from all ranks."""
    ranks = [epoch(path, World("ddp", rank, size, torch.device("cpu")), workers) for rank in range(size)]
    batches = [batch for step in zip(*ranks, strict=True) for micro in step for batch in micro]
    replaced = sorted((bad.error.sample, bad.substitute) for batch in batches for bad in batch.bad)
    assert {sample for sample, _ in replaced} == {3, 20, 21, 70}
    return [
        *(torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "labels")),
        torch.tensor(replaced),
    ]


def epoch(path: str, world: World, workers: int) -> list:
    recipe = Recipe(seed=5, data=Data(path=path, global_batch=16, workers=0), augment=Augment(image_size=16))
    stream = make_input(recipe, *open_data(path), world).stream
    with dataclasses.replace(stream, loading=Loading(workers, world.device)).open(0, 5) as batches:
        return [[dataclasses.replace(batch, images=batch.images.clone()) for batch in step] for step in batches]


def test_a_split_of_bad_samples_only(damaged):
    with pytest.raises(UserError, match="and 16 substitutes of it are bad: most of the split is unreadable"):
        epoch(damaged(list(range(80)), []), World("ddp", 0, 1, torch.device("cpu")), 0)


def batch(*samples: int, split: str = "train") -> Batch:
    """An empty batch for which these bad samples were met."""
    nothing = torch.zeros(0, dtype=torch.int64)
    bad = (Replaced(BadSample("a.tar", f"k{sample}", sample, split, "why"), 1) for sample in samples)
    return Batch(nothing, nothing, nothing, 0, 0, 0, tuple(bad))


def test_the_budget_counts_different_samples_of_the_training_split(alone, tmp_path):
    quarantine = Quarantine(tmp_path, alone, "train", budget=2)
    quarantine.note([batch(4, 4), batch(9, 8, split="val")], step=1)
    quarantine.poll()
    assert len(quarantined(tmp_path)) == 3
    quarantine.note([batch(4, 5)], step=2)
    quarantine.poll()
    quarantine.note([batch(6)], step=3)
    with pytest.raises(UserError) as error:
        quarantine.poll()
    text = str(error.value)
    assert "3 samples of split 'train' are bad, and data.max_bad allows 2" in text
    assert all(f"  - a.tar: k{sample}: why\n" in text for sample in (4, 5, 6))
    assert "larger --data.max-bad" in text
    assert len(quarantined(tmp_path)) == 5


def test_a_resumed_quarantine_goes_on_from_the_checkpoint(alone: World, tmp_path):
    quarantine = Quarantine(tmp_path, alone, "train", budget=2)
    for step in (1, 2):
        quarantine.note([batch(step)], step)
        assert not quarantine.poll()
    again = Quarantine(tmp_path, alone, "train", budget=2)
    again.resume(1)
    assert [line["sample"] for line in quarantined(tmp_path)] == [1]
    again.note([batch(1, 2)], 2)
    again.poll()
    assert [line["sample"] for line in quarantined(tmp_path)] == [1, 2]
