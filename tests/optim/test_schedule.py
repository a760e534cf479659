"""The learning rate of recipes: warm-up, cosine by steps and by epochs, cool-down."""

import dataclasses
import math

import pytest

from pipeline.durations import make_schedule
from pipeline.optim import WarmupCosine
from pipeline.recipe import Data, Recipe, Schedule
from pipeline.validate import validate

EPOCH = 7  # steps
T2T = Schedule(
    length="310 epochs",
    warmup="10 epochs",
    lr=5e-4,
    warmup_lr=5e-4 * 1e-6,
    min_lr=1e-5,
    cooldown="10 epochs",
    cooldown_lr=1e-6,
    cosine_per="epoch",
)


def schedule_of(section: Schedule) -> WarmupCosine:
    recipe = Recipe(data=Data(global_batch=16), schedule=section)
    validate(recipe)
    return make_schedule(recipe, EPOCH)[0]


def test_t2t_vits_epochs():
    """mmengine's CosineAnnealingLR by epochs (begin 10, T_max 290, eta_min 1e-5), then a tenth of what it reaches."""
    schedule = schedule_of(T2T)
    epochs = [[schedule(epoch * EPOCH + step) for step in range(EPOCH)] for epoch in range(312)]
    warm = [rate for epoch in epochs[:10] for rate in epoch]
    assert warm == pytest.approx([5e-10 + (5e-4 - 5e-10) * step / (10 * EPOCH) for step in range(10 * EPOCH)])
    for number, rates in enumerate(epochs[10:300], start=10):
        expected = 1e-5 + (5e-4 - 1e-5) * (1 + math.cos(math.pi * (number - 10) / 290)) / 2
        assert rates == [pytest.approx(expected, rel=1e-12)] * EPOCH
        assert len({*rates}) == 1
    assert epochs[10][0] == 5e-4
    assert epochs[155][0] == pytest.approx((5e-4 + 1e-5) / 2)
    assert epochs[299][0] == pytest.approx(1.001437e-5, rel=1e-6)
    assert epochs[300:] == [[1e-6] * EPOCH] * 12, "and on past the end"


def test_by_steps_the_cosine_ends_where_the_cool_down_begins():
    cooled = schedule_of(dataclasses.replace(T2T, cosine_per="step"))
    plain = schedule_of(Schedule(length="300 epochs", warmup="10 epochs", lr=5e-4, warmup_lr=5e-10, min_lr=1e-5))
    assert [cooled(step) for step in range(300 * EPOCH)] == [plain(step) for step in range(300 * EPOCH)]
    assert {plain(step) for step in range(300 * EPOCH, 312 * EPOCH)} == {1e-5}
    assert {cooled(step) for step in range(300 * EPOCH, 312 * EPOCH)} == {1e-6}
    assert len({cooled(step) for step in range(10 * EPOCH, 300 * EPOCH)}) == 290 * EPOCH


@pytest.mark.parametrize("cooldown", ["2 epochs", "14 steps", "224 images", "10%"])
def test_a_cool_down_in_every_unit(cooldown):
    schedule = schedule_of(dataclasses.replace(T2T, length="20 epochs", warmup="1 epochs", cooldown=cooldown))
    assert (schedule.warmup_steps, schedule.total_steps) == (7, 126)


def test_a_warm_up_that_ends_within_an_epoch_reaches_the_full_rate():
    schedule = schedule_of(Schedule(length="3 epochs", warmup="3 steps", lr=0.1, min_lr=0.01, cosine_per="epoch"))
    rates = [schedule(step) for step in range(3 * EPOCH)]
    assert rates[3:7] == [0.1] * 4
    assert rates[7:14] == [pytest.approx(0.01 + 0.09 / 2 * (1 + math.cos(math.pi * 4 / 18)))] * 7
    assert rates[14] == rates[20] < rates[13]
