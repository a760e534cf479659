"""Every optimizer on two ranks of every backend of the table equals itself on one process, and resumes."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import on_ranks
import pytest
import ranks
import timm
import torch
from safetensors.torch import load_file

GROUPS = (on_ranks.STRATEGIES, on_ranks.OTHERS)


def each(of: Callable[[tuple[str, ...]], list]) -> list:
    """What `of` says of each group of strategies, behind that group; but for the first, it is left to `make soak`."""
    soak = {group: () if group == GROUPS[0] else pytest.mark.soak for group in GROUPS}
    return [pytest.param(group, *case, marks=soak[group]) for group in GROUPS for case in of(group)]


def moved(group: tuple[str, ...]) -> list[tuple]:
    return [(size, *move) for size in (1, 2) for move in on_ranks.moves(size, group)]


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory) -> Callable[[tuple[str, ...]], Path]:
    """runs_of(strategies): where their runs are."""

    @functools.cache
    def train(strategies: tuple[str, ...]) -> Path:
        root = tmp_path_factory.mktemp("optim")
        for work in (on_ranks.train_all, on_ranks.continue_all):
            started = [ranks.run_function(work, (root, strategies), root / "logs", size) for size in (1, 2)]
            for ended in [running.wait() for running in started]:
                assert set(ended.codes) == {0}, "\n".join(ended.outputs)
        return root

    return train


@pytest.fixture(scope="module")
def runs(runs_of) -> Path:
    return runs_of(on_ranks.STRATEGIES)


def losses(run: Path) -> list[float]:
    return json.loads((run / "losses.json").read_text())


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights.safetensors")


@pytest.mark.parametrize(("group", "strategy", "name"), each(functools.partial(on_ranks.cases, 2)))
def test_two_ranks_equal_one_process(runs_of, group, strategy, name):
    """Muon computes in bf16, and FSDP2 adds its products up in parts."""
    runs = runs_of(group)
    found, expected = runs / f"{strategy}-{name}-2", runs / f"ddp-{name}-1"
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    tolerance = 1e-3 if name == "muon" else 1e-5
    torch.testing.assert_close(weights(found), weights(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("group", "strategy", "name", "size"), each(on_ranks.resumed))
def test_a_resumed_run_is_bitwise_the_same(runs_of, group, strategy, name, size):
    runs, run = runs_of(group), f"{strategy}-{name}-{size}"
    assert losses(runs / run / "resumed") == losses(runs / run)[on_ranks.SAVED :]
    torch.testing.assert_close(weights(runs / run / "resumed"), weights(runs / run), rtol=0, atol=0)


@pytest.mark.parametrize(("group", "size", "name", "strategy", "saved"), each(moved))
def test_a_run_goes_on_in_another_world(runs_of, group, size, name, strategy, saved):
    runs = runs_of(group)
    whole, moved = runs / f"ddp-{name}-1", runs / f"{strategy}-{name}-{size}-from-{saved}"
    assert losses(moved) == pytest.approx(losses(whole)[on_ranks.SAVED :], rel=1e-5)
    torch.testing.assert_close(weights(moved), weights(whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", on_ranks.TOLERANCES)
def test_the_references_steps_on_two_ranks(runs, strategy, name):
    """Which the ranks have compared with the reference's after each step."""
    found = load_file(runs / f"{name}-{strategy}.safetensors")
    torch.testing.assert_close(found, on_ranks.follow(name, on_ranks.TOLERANCES[name]), rtol=0, atol=1e-9)


def test_two_ranks_share_shampoos_state(runs):
    alone = on_ranks.state_bytes(timm.create_model("vittm_tiny", num_classes=10))
    for shared in json.loads((runs / "state.json").read_text()).values():
        assert len(shared) == 2
        assert max(shared) <= 0.6 * alone
        assert sum(shared) >= alone
