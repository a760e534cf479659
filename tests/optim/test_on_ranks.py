"""Every optimizer on two ranks of every backend of the table equals itself on one process, and resumes."""

import json
from pathlib import Path

import on_ranks
import pytest
import ranks
import timm
import torch
from safetensors.torch import load_file

ON_TWO = on_ranks.cases(2)
MOVED = [(size, *move) for size in (1, 2) for move in on_ranks.moves(size)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("optim")
    for work in (on_ranks.train_all, on_ranks.continue_all):
        started = [ranks.run_function(work, (root,), root / "logs", size) for size in (1, 2)]
        for ended in [running.wait() for running in started]:
            assert set(ended.codes) == {0}, "\n".join(ended.outputs)
    return root


def losses(run: Path) -> list[float]:
    return json.loads((run / "losses.json").read_text())


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights.safetensors")


@pytest.mark.parametrize(("strategy", "name"), ON_TWO)
def test_two_ranks_equal_one_process(runs, strategy, name):
    """Muon computes in bf16, and FSDP2 adds its products up in parts."""
    found, expected = runs / f"{strategy}-{name}-2", runs / f"ddp-{name}-1"
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    tolerance = 1e-3 if name == "muon" else 1e-5
    torch.testing.assert_close(weights(found), weights(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("run", ["-".join(map(str, case)) for case in on_ranks.RESUMED])
def test_a_resumed_run_is_bitwise_the_same(runs, run):
    assert losses(runs / run / "resumed") == losses(runs / run)[on_ranks.SAVED :]
    torch.testing.assert_close(weights(runs / run / "resumed"), weights(runs / run), rtol=0, atol=0)


@pytest.mark.parametrize(("size", "name", "strategy", "saved"), MOVED)
def test_a_run_goes_on_in_another_world(runs, size, name, strategy, saved):
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
