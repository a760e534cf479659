"""The stream as a source of webdataset: its stages work on it, and ranks and workers change nothing."""

import gc
import itertools
import shutil

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from pipeline.data.webdataset import WebDatasetSource
from shards.errors import UserError
from shards.index import Index
from shards.members import MemberReader
from shards.plan import Plan, WindowShuffle
from shards.reader import BadSample, Reader

BATCH = 24  # of 80 samples: 3 batches, and a tail of 8


def plan_of(index: Index, window: bool = False) -> Plan:
    sizes = tuple(shard.num_samples for shard in index.split("train").shards)
    arguments = [WindowShuffle(sizes, 4, 10)] if window else []
    return Plan(80, index.fingerprint("train"), 5, BATCH, *arguments)


@pytest.fixture
def index(shards) -> Index:
    return Index.load(shards)


def planned(index: Index, plan: Plan, epoch: int = 0) -> list[str]:
    reader = Reader(index, "train")
    return [reader.key(sample) for batch in range(plan.batches_per_epoch) for sample in plan.ids(epoch, batch)]


@pytest.mark.filterwarnings("ignore:unclosed file .*tar'>:ResourceWarning")  # of webdataset's own reader
def test_its_samples_are_those_that_webdataset_reads(index):
    plan = plan_of(index)
    paths = [str(index.root / shard.name) for shard in index.split("train").shards]
    theirs = {sample["__key__"]: sample for sample in wds.WebDataset(paths, shardshuffle=False, empty_check=False)}
    gc.collect()
    ours = list(WebDatasetSource(MemberReader(index, "train"), plan))
    assert [sample["__key__"] for sample in ours] == planned(index, plan)
    for sample in ours:
        expected = theirs[sample["__key__"]]
        assert {*expected} - {*sample} <= {"__local_path__"}
        assert sample == {name: expected[name] for name in sample}


@pytest.mark.parametrize("window", [False, True])
def test_stages_of_webdataset_on_two_ranks_of_two_workers(index, window):
    """Decoded, batched by the loader, in the plan's order."""
    plan, reader = plan_of(index, window), Reader(index, "train")
    keys, labels = [], []
    for rank in range(2):
        source = WebDatasetSource(MemberReader(index, "train"), plan, rank, world=2, accumulation=2)
        pipeline = wds.DataPipeline(source, wds.decode("torchrgb8"), wds.to_tuple("__key__", "jpg", "cls"))
        batches = list(DataLoader(pipeline, batch_size=6, num_workers=2, multiprocessing_context="forkserver"))
        assert [tuple(images.shape) for _, images, _ in batches] == [(6, 3, 16, 16)] * 6
        keys.append([key for names, *_ in batches for key in names])
        labels.append([label for *_, numbers in batches for label in numbers.tolist()])
    ids = np.array([plan.ids(0, batch) for batch in range(3)]).reshape(3, 2, 12)  # [step, rank, sample]
    for rank in range(2):
        assert keys[rank] == [reader.key(sample) for sample in ids[:, rank].ravel()]
        assert labels[rank] == [reader.read(sample, bytes)[1] for sample in ids[:, rank].ravel()]


def test_epochs_with_workers_that_stay(index):
    plan = plan_of(index)
    source = WebDatasetSource(MemberReader(index, "train"), plan)
    pipeline = wds.DataPipeline(source, wds.to_tuple("__key__"), wds.batched(BATCH))
    options = {"persistent_workers": True, "multiprocessing_context": "forkserver"}
    loader = wds.WebLoader(pipeline, batch_size=None, num_workers=1, **options)
    for epoch in (0, 3, 3):
        source.epoch = epoch
        assert [key for (keys,) in loader for key in keys] == planned(index, plan, epoch)
    assert source.epoch == 3


def test_a_bad_sample_is_named(index, tmp_path):
    root = shutil.copytree(index.root, tmp_path / "copied")
    source = WebDatasetSource(MemberReader(Index.load(root), "train"), plan_of(index))
    (root / "train-000001.tar").unlink()
    with pytest.raises(BadSample, match=r"train-000001\.tar: key unreadable, .*FileNotFoundError"):
        list(wds.DataPipeline(source, wds.decode("pil")))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99), st.data())
def test_loaders_that_take_turns_restore_the_order(world, workers, accumulation, samples, rest, data):
    """As a DataLoader does: a batch of each worker in turn, until it has no more."""
    global_batch = world * accumulation * samples
    plan = Plan(global_batch * data.draw(st.integers(1, 4)) + rest % global_batch, "", 0, global_batch)
    epoch = data.draw(st.integers(0, 3))
    batches = []
    for rank in range(world):
        source = WebDatasetSource(None, plan, rank, world, accumulation)
        source.epoch = epoch
        shares = [list(source.micro_batches(worker, workers)) for worker in range(workers)]
        turns = [batch for turn in itertools.zip_longest(*shares) for batch in turn if batch is not None]
        assert {len(batch) for batch in turns} == {samples}
        batches.append(np.concatenate(turns).reshape(plan.batches_per_epoch, -1))
    assert np.array_equal(
        np.concatenate(batches, axis=1), [plan.ids(epoch, batch) for batch in range(plan.batches_per_epoch)]
    )


def test_layouts_that_cannot_be(index):
    reader, plan = MemberReader(index, "train"), plan_of(index)
    with pytest.raises(UserError, match="a global batch of 24 does not cut evenly into 5 ranks x 1 micro-batches"):
        WebDatasetSource(reader, plan, 0, 5)
    with pytest.raises(UserError, match="rank 2 of 2: ranks are 0 to 1"):
        WebDatasetSource(reader, plan, 2, 2)
