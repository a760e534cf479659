"""Shampoo on one process: the reference's steps, blocks, roots, and what its state is."""

import copy

import on_ranks
import pytest
import torch
from torch import nn

from pipeline.optim.blocks import Block, cut, deal, merge, row_range
from pipeline.optim.precondition import Kept, inverse_root, renew_roots
from pipeline.optim.shampoo import Shampoo

OPTIONS = {
    "lr": 0.1,
    "betas": (0.9, 0.999),
    "epsilon": 1e-12,
    "weight_decay": 0.0,
    "max_preconditioner_dim": 8,
    "precondition_frequency": 2,
    "start_preconditioning_step": 2,
}


@pytest.mark.parametrize("name", on_ranks.TOLERANCES)
def test_the_references_steps(name):
    on_ranks.follow(name, on_ranks.TOLERANCES[name])


@pytest.mark.parametrize(
    ("shape", "merged"),
    [
        ((12, 7), (12, 7)),
        ((2, 3, 2), (12,)),
        ((4, 3, 3, 3), (12, 9)),
        ((1, 5, 1, 4), (5, 4)),
        ((1, 1), (1,)),
        ((), (1,)),
        ((40, 2, 3), (40, 6)),
    ],
)
def test_dimensions_are_merged_from_the_left(shape, merged):
    assert merge(shape, 12) == merged


def test_large_dimensions_are_split():
    blocks = cut(3, (20, 5), 8)
    assert [(block.name, block.shape) for block in blocks] == [("0_0", (8, 5)), ("1_0", (8, 5)), ("2_0", (4, 5))]
    assert blocks[1] == Block(3, "1_0", (slice(8, 16), slice(0, 5)))
    assert blocks[1].cost == 8**3 + 5**3
    assert [block.name for block in cut(0, (9, 9), 8)] == ["0_0", "0_1", "1_0", "1_1"]


def test_the_dearest_blocks_are_dealt_first():
    assert deal([1, 8, 3, 5, 3], world=2) == [1, 0, 1, 1, 0]
    assert deal([1, 8, 3, 5, 3], world=1) == [0] * 5


@pytest.mark.parametrize(
    ("shape", "merged", "ranges"),
    [
        ((9,), (9,), [(0, 5), (5, 9)]),
        ((4, 3, 3, 3), (12, 9), [(0, 6), (6, 12)]),
        ((1, 5, 4), (5, 4), [(0, 5), (5, 5)]),
    ],
)
def test_a_shard_holds_whole_rows_of_the_merged_parameter(shape, merged, ranges):
    assert [row_range(shape, merged, part, 2) for part in range(2)] == [range(*each) for each in ranges]


def test_an_inverse_root_times_itself_is_the_inverse():
    half = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = half @ half.T
    root = inverse_root(matrix, 4, 0.0)
    torch.testing.assert_close(torch.linalg.matrix_power(root, 4) @ matrix, torch.eye(5, dtype=torch.float64))


def test_a_negative_eigenvalue_shifts_all_of_them_up():
    root = inverse_root(torch.diag(torch.tensor([3.0, -1.0])), 2, 0.25)
    torch.testing.assert_close(root, torch.diag(torch.tensor([4.25, 0.25]).rsqrt()))


def test_a_decomposition_that_fails_is_repeated_in_float64(monkeypatch):
    """No matrix is known that LAPACK fails on in float32 alone, so the failure is made."""
    real = torch.linalg.eigh

    def fails_in_float32(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    root = inverse_root(4 * torch.eye(3), 2, 0.0)
    torch.testing.assert_close(root, torch.eye(3) / 2)


def test_a_root_that_cannot_be_had_leaves_the_one_before():
    broken, sound = torch.full((2, 2), float("nan")), 4 * torch.eye(3) * (1 - 0.999**7)
    before = torch.eye(2) * 5
    kept = Kept("block_0_0", [broken, sound], [before.clone(), torch.eye(3)], torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.warns(UserWarning, match="cannot decompose factor 0 of block_0_0 at step 7, not in float64 either"):
        renew_roots([kept], 7, OPTIONS)
    torch.testing.assert_close(kept.roots, [before, torch.eye(3) * 4**-0.25])


def steps(optimizer: Shampoo, parameter: nn.Parameter, numbers: range) -> None:
    for number in numbers:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)).to(parameter)
        optimizer.step()


def test_state_is_float32_at_least_and_stays_so_when_it_is_loaded():
    parameter = nn.Parameter(torch.ones(6, 10, dtype=torch.bfloat16))
    optimizer = Shampoo([parameter], **OPTIONS)
    steps(optimizer, parameter, range(3))
    other = nn.Parameter(parameter.detach().clone())
    resumed = Shampoo([other], **OPTIONS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {tensor.dtype for tensor in resumed.state[other].values()} == {torch.float32}
    assert sorted(optimizer.state[parameter]) == sorted(
        ["step"] + [f"block_0_{i}_{what}" for i in (0, 1) for what in WHAT]
    )
    steps(optimizer, parameter, range(3, 6))
    steps(resumed, other, range(3, 6))
    assert torch.equal(parameter, other)


WHAT = ("exp_avg", "exp_avg_sq", "factor_0", "factor_1", "root_0", "root_1")


def test_a_parameter_without_gradient_is_left_alone():
    moved, idle = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimizer = Shampoo([moved, idle], **OPTIONS | {"weight_decay": 0.1})
    steps(optimizer, moved, range(2))
    assert torch.equal(idle, torch.ones(3, 3))
    assert not optimizer.state[idle]
    steps(optimizer, idle, range(1))
    assert (optimizer.state[moved]["step"], optimizer.state[idle]["step"]) == (3, 1)


def test_groups_have_settings_of_their_own():
    slow, fast = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimizer = Shampoo([{"params": [slow], "lr": 0.0}, {"params": [fast]}], **OPTIONS)
    slow.grad = fast.grad = torch.ones(3, 3)
    assert optimizer.step(lambda: 7) == 7
    assert torch.equal(slow, torch.ones(3, 3))
    assert not torch.equal(fast, slow)
    with pytest.raises(RuntimeError, match="deals blocks to ranks once, when it is made: give it all groups there"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_an_unknown_setting_of_grafting_is_an_error():
    with pytest.raises(TypeError, match=r"takes no \['grafting_beta3'\]; of grafting it takes \['grafting_beta2', "):
        Shampoo([nn.Parameter(torch.ones(2))], **OPTIONS, grafting_beta3=0.5)


def test_before_its_start_it_is_adam():
    shampooed, adamed = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))
    shampoo = Shampoo([shampooed], **OPTIONS | {"start_preconditioning_step": 100, "weight_decay": 0.1})
    adam = torch.optim.AdamW([adamed], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for number in range(5):
        for parameter, optimizer in ((shampooed, shampoo), (adamed, adam)):
            steps(optimizer, parameter, range(number, number + 1))
    torch.testing.assert_close(shampooed, adamed)
