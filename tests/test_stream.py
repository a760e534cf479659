"""The stream: the same samples in the same global batches on any world, from any step, in any number of workers."""

import dataclasses
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from pipeline.augment.erasing import Erasing, Noise
from pipeline.augment.mixing import Mixing
from pipeline.backend.world import World
from pipeline.data.batch import PADDING
from pipeline.data.device import DeviceAugment
from pipeline.data.loading import Loading
from pipeline.data.stream import TrainStream, evaluation_batches
from pipeline.prepare import make_input
from pipeline.recipe import Augment, Data, Recipe
from shards.errors import UserError
from shards.layout import Layout
from shards.store import open_data

CPU = torch.device("cpu")
BATCH, STEPS = 16, 7  # 80 samples make 5 batches an epoch, so these reach into a second one


def rank_of(rank: int, size: int) -> World:
    return World("ddp", rank, size, CPU)


@pytest.fixture
def recipe(shards) -> Recipe:
    augment = Augment(image_size=16, randaugment_ops=2, randaugment_magnitude=15)
    return Recipe(seed=5, data=Data(path=str(shards), global_batch=BATCH, workers=0), augment=augment)


@pytest.fixture
def stream_of(recipe):
    """stream_of(rank, size, accumulation, workers)"""

    def make(rank: int = 0, size: int = 1, accumulation: int = 1, workers: int = 0) -> TrainStream:
        stream = make_input(recipe, *open_data(recipe.data.path), rank_of(rank, size)).stream
        layout = Layout(BATCH, size, accumulation)
        return TrainStream(stream.samples, stream.plan, rank_of(rank, size), layout, Loading(workers, CPU))

    return make


def read(stream: TrainStream, start: int = 0, stop: int = STEPS) -> list:
    """All steps; the memory of their images is used again."""
    with stream.open(start, stop) as batches:
        return [[dataclasses.replace(batch, images=batch.images.clone()) for batch in step] for step in batches]


def joined(per_rank: list, field: str) -> list[torch.Tensor]:
    """A field of each global batch, put together from the micro-batches of all ranks, in order."""
    steps = zip(*per_rank, strict=True)
    return [torch.cat([getattr(batch, field) for micro in ranks for batch in micro]) for ranks in steps]


@pytest.mark.parametrize(("size", "accumulation", "workers"), [(2, 1, 1), (4, 2, 0), (1, 4, 2), (3, 2, 1)])
def test_what_enters_the_model_depends_on_neither_world_nor_workers(stream_of, size, accumulation, workers):
    whole = [read(stream_of())]
    parts = [read(stream_of(rank, size, accumulation, workers)) for rank in range(size)]
    for field in ("ids", "labels", "images"):
        for expected, found in zip(joined(whole, field), joined(parts, field), strict=True):
            assert torch.equal(expected, found)
    firsts = [batch.first for ranks in zip(*parts, strict=True) for micro in ranks for batch in micro]
    expected = [part.start for rank in range(size) for part in Layout(BATCH, size, accumulation).micro_batches(rank)]
    assert firsts == expected * STEPS


def test_an_epoch_holds_every_sample_once(stream_of):
    epochs = torch.cat(joined([read(stream_of(), 0, 10)], "ids")).reshape(2, -1)
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(80))
    assert not torch.equal(epochs[0], epochs[1])


def test_entering_at_a_step_equals_getting_there(stream_of):
    whole, rest = read(stream_of()), read(stream_of(), 4)
    for (expected,), (found,) in zip(whole[4:], rest, strict=True):
        assert torch.equal(expected.images, found.images)
        assert (expected.step, expected.epoch) == (found.step, found.epoch)


@pytest.mark.parametrize("erasing", [Erasing(0.5), Erasing(0.5, (0.02, 1 / 3), Noise(5))], ids=["mean", "noise"])
def test_erasing_and_mixing_depend_on_the_global_batch_alone(stream_of, erasing):
    mixing = Mixing(mixup=True, cutmix=True, mixup_alpha=0.8, cutmix_alpha=1.0)
    augment = DeviceAugment(5, seed=5, erasing=erasing, mixing=mixing, label_smoothing=0.1)
    whole = [augment(batch) for (batch,) in read(stream_of())]
    parts = [[augment(batch) for (batch,) in read(stream_of(rank, 3))] for rank in range(3)]
    for step, (images, targets) in enumerate(whole):
        assert torch.equal(images, torch.cat([part[step][0] for part in parts]))
        assert torch.equal(targets, torch.cat([part[step][1] for part in parts]))
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(BATCH))
    assert len({tuple(targets.flatten().tolist()) for _, targets in whole}) == STEPS


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_the_augmentation_of_t2t_vit_and_deit(recipe, decode):
    """Bicubic crops, timm's RandAugment, erasing with noise: by workers of two ranks as by one process."""
    augment = Augment(16, decode, interpolation="bicubic", erasing=0.5, erasing_fill="noise", mixup=True, cutmix=True)
    augment = dataclasses.replace(
        augment, randaugment="timm-increasing", randaugment_ops=2, randaugment_magnitude=9, randaugment_std=0.5
    )
    found = []
    for size, workers in ((1, 0), (2, 1)):
        data = dataclasses.replace(recipe.data, workers=workers)
        given = dataclasses.replace(recipe, data=data, augment=augment, label_smoothing=0.1)
        inputs = [make_input(given, *open_data(data.path), rank_of(rank, size)) for rank in range(size)]
        parts = [[each.augment(batch) for (batch,) in read(each.stream, 0, 3)] for each in inputs]
        found.append([torch.cat([part[step][0] for part in parts]) for step in range(3)])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
    plain = make_input(recipe, *open_data(recipe.data.path), rank_of(0, 1))
    assert not torch.equal(found[0][0], plain.augment(read(plain.stream, 0, 1)[0][0])[0])


def test_workers_leave_signals_to_the_trainer(stream_of):
    with stream_of(workers=1).open(0, STEPS) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker.pid, number)
        assert len(list(batches)) == STEPS - 1
    worker.join(10)
    assert worker.exitcode == 0


def test_too_little_shared_memory_is_told_before_work(recipe):
    large = dataclasses.replace(recipe, augment=Augment(image_size=4096))
    validation = make_input(large, *open_data(recipe.data.path), rank_of(0, 1)).validation
    with (
        pytest.raises(UserError, match="3 batches of 1000 images of 4096 x 4096 pixels need 144,000 MiB of sh"),
        evaluation_batches(validation, 1000, rank_of(0, 1), Loading(1, CPU)),
    ):
        pass


def test_a_state_of_other_data_is_refused(stream_of):
    stream = stream_of()
    assert stream.state(7) | {"fingerprint": ""} == {
        "fingerprint": "",
        "seed": 5,
        "global_batch": BATCH,
        "epoch": 1,
        "batches": 2,
        "shuffle": "global",
    }
    for name, other in (("fingerprint", "0123"), ("global_batch", 32), ("seed", 6)):
        with pytest.raises(UserError, match=rf"ckpt was made with the data's {name} {other}, but it is .* now"):
            stream.check_state(stream.state(7) | {name: other}, "ckpt")


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("batch", [4, 100])
def test_evaluation_sees_every_sample_once(recipe, size, batch):
    found, counts = [], set()
    for rank in range(size):
        validation = make_input(recipe, *open_data(recipe.data.path), rank_of(rank, size)).validation
        with evaluation_batches(validation, batch, rank_of(rank, size), Loading(0, CPU)) as batches:
            ids = [part.ids.numpy() for part in batches]
        counts.add((len(ids), *(len(part) for part in ids)))
        found.append(np.concatenate(ids))
    assert len(counts) == 1  # sharded models need the same number of equal batches on every rank
    known = np.concatenate(found)
    assert sorted(known[known != PADDING]) == list(range(23))
