"""Token expansion by itself: the authors' reference files, the specification taken literally, and what is refused."""

import json
import random
from pathlib import Path

import pytest
import toe_reference as reference
import torch
from safetensors.torch import load_file

from pipeline.models.toe import TokenExpansion
from shards.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "toe"
FILES = {path.stem: json.loads(path.read_text()) for path in sorted(GOLDEN.glob("*.json"))}
CASES = [(name, case) for name, file in FILES.items() for case in file["cases"] if case["distance"] == "cosine"]
EXACT = {"rtol": 0, "atol": 1e-5}
DISTANCES = ("cosine", "manhattan", "euclidean")


def expansion_of(name: str) -> TokenExpansion:
    file = FILES[name]
    rates = file["keep_rate"], file["initialization_keep_rate"], file["expansion_multiple_stage"]
    return TokenExpansion(file["expansion_step"], *rates)


def test_both_files_are_here():
    assert len(CASES) == 8


@pytest.mark.parametrize(("name", "case"), CASES, ids=lambda value: value if isinstance(value, str) else value["key"])
def test_equals_the_authors(name, case):
    tensors, expansion, key = load_file(GOLDEN / f"{name}.safetensors"), expansion_of(name), case["key"]
    x = tensors["x"].requires_grad_()
    expansion.set_epoch(case["epoch"])
    tokens, indices = expansion(x)
    torch.testing.assert_close(tokens, tensors[f"{key}_y"], **EXACT)
    assert tokens.shape[1] == case["out_tokens"]
    if case["bypass"]:
        assert indices is None
        assert torch.equal(tokens, x)
    else:
        assert torch.equal(indices, tensors[f"{key}_idx"])
    if case["stage"] == 1:
        weights = torch.linspace(-1, 1, tokens.numel()).view_as(tokens)  # so did the authors' file
        (tokens * weights).sum().backward()
        torch.testing.assert_close(x.grad, tensors["cosine_stage1_grad_x"], **EXACT)


def drawn_settings(generator: random.Random) -> dict:
    """Any that are allowed; rates with and without an exact float."""
    num_stages = generator.randint(1, 4)
    rates = sorted(generator.sample(range(3, 21), num_stages))
    rates = [rate / 20 if generator.random() < 0.7 else (rate - generator.random()) / 20 for rate in rates]
    return {
        "steps": sorted(generator.sample(range(9), num_stages)),
        "keep_rates": rates if generator.random() < 0.7 else [*rates[:-1], 1.0],
        "initial_keep_rate": generator.choice([0.5, 0.7, 0.99, generator.uniform(0.3, 0.9)]) * rates[0],
        "repetitions": generator.choice([1, 2, 3, 7]),
        "distance": generator.choice(DISTANCES),
        "num_prefix_tokens": generator.randint(0, 2),
        "num_suffix_tokens": generator.randint(0, 2),
    }


@pytest.mark.parametrize("seed", range(40))
def test_equals_the_specification(seed):
    generator = random.Random(seed)
    given = drawn_settings(generator)
    steps, rates, first = given["steps"], given["keep_rates"], given["initial_keep_rate"]
    apart, behind = given["num_prefix_tokens"], given["num_suffix_tokens"]
    num = generator.randint(max(5, int(1 / first) + 1), 60)
    expansion = TokenExpansion(**given)
    torch.manual_seed(seed)
    x = torch.randn(2, apart + num + behind, 6, dtype=torch.float64)
    alike = [reference.likenesses(sample[apart : apart + num], given["distance"]) for sample in x]
    for epoch in {0, *steps, steps[-1] + 1}:
        stage = sum(step <= epoch for step in steps)
        expansion.set_epoch(epoch)
        tokens, indices = expansion(x)
        if stage == 0 or (stage == len(steps) and rates[-1] == 1):
            assert indices is None
            assert tokens is x
            continue
        for sample, mine, found, places in zip(x, alike, tokens, indices, strict=True):
            patches, middle = sample[apart : apart + num], slice(apart, len(found) - behind)
            selected = reference.select(mine, rates, first, given["repetitions"], stage)
            last = range(apart + num, len(sample))
            assert places.tolist() == [*range(apart), *(apart + token for token in selected), *last]
            torch.testing.assert_close(found[middle], reference.merge(patches, mine, selected))
            assert torch.equal(found[:apart], sample[:apart])
            assert torch.equal(found[middle.stop :], sample[last.start :])


@pytest.mark.parametrize(
    ("rates", "first", "numbers"),
    [
        ((0.5, 0.75, 1.0), 0.25, (99, 148, 197)),
        ((0.4, 0.7, 1.0), 0.2, (79, 137, 197)),
        ((0.6, 0.8, 1.0), 0.3, (117, 156, 197)),
    ],
)
def test_numbers_of_the_published_settings(rates, first, numbers):
    expansion = TokenExpansion((0, 100, 200), rates, first, 2)
    x = torch.randn(1, 197, 4)
    for epoch, number in zip((0, 100, 200), numbers, strict=True):
        expansion.set_epoch(epoch)
        assert expansion(x)[0].shape[1] == number


def test_equals_are_taken_by_their_order():
    """Tokens of two kinds, both on the grid: all others are equally like it, and join the first selected of a kind."""
    x = torch.eye(2)[[0, 0, 0, 0, 1, 1, 1, 1]][None]
    x[0, 7] = torch.tensor([0.0, 4.0])  # as like 4 as 5 and 6 are
    tokens, indices = TokenExpansion((0,), (0.5,), 0.25, 1, num_prefix_tokens=0)(x)
    assert indices.tolist() == [[0, 4, 1, 2]]
    assert tokens[0].tolist() == [[1, 0], [0, 1.75], [1, 0], [1, 0]]


def test_distances_do_what_they_say():
    """Directions at 0, 40 and 90 degrees, and 10 of which the rest is merged: to the nearest by each of them."""
    angles = torch.tensor([0.0, 10, 40, 90]).deg2rad()
    x = torch.stack((angles.cos(), angles.sin()), dim=1)[None]
    for distance in DISTANCES:
        tokens, indices = TokenExpansion((0,), (0.75,), 0.25, 2, distance, num_prefix_tokens=0)(x)
        assert indices.tolist() == [[0, 3, 2]]
        torch.testing.assert_close(tokens[0, 0], (x[0, 0] + x[0, 1]) / 2)
        assert torch.equal(tokens[0, 1:], x[0, [3, 2]])


def test_low_precision_selects_as_the_tokens_are():
    x = torch.randn(2, 50, 8).bfloat16()
    expansion = TokenExpansion((0,), (0.5,), 0.25, 2)
    tokens, indices = expansion(x)
    wide, expected = expansion(x.float())
    assert tokens.dtype == torch.bfloat16
    assert torch.equal(indices, expected)
    torch.testing.assert_close(tokens.float(), wide, rtol=0.01, atol=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        again, found = expansion(x.float())
    assert torch.equal(found, expected)
    assert torch.equal(again, wide)


def test_it_is_off_in_evaluation_before_its_first_epoch_and_without_steps():
    x = torch.randn(1, 17, 4)
    for steps, epoch, training in (((0,), 0, False), ((3,), 2, True), ((), 5, True)):
        expansion = TokenExpansion(steps, (0.5,) * len(steps), 0.25, 2).train(training)
        expansion.set_epoch(epoch)
        tokens, indices = expansion(x)
        assert tokens is x
        assert indices is None


def test_it_holds_nothing():
    expansion = TokenExpansion((0,), (0.5,), 0.25, 2)
    assert not expansion.state_dict()
    assert not [*expansion.parameters(), *expansion.buffers()]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"steps": (0, 5)}, "steps (0, 5) and keep_rates (0.5,): each stage has one of both, but they are 2 and 1"),
        ({"steps": (5, 5), "keep_rates": (0.5, 0.6)}, "each must be above the one before"),
        ({"steps": (-1,)}, "steps (-1,): epochs, from 0"),
        ({"keep_rates": (1.5,)}, "keep_rates (1.5,): shares of tokens, 0 < rate <= 1"),
        ({"steps": (0, 5), "keep_rates": (0.6, 0.5)}, "keep_rates (0.6, 0.5)"),
        ({"initial_keep_rate": 0.5}, "initial_keep_rate 0.5: must be above 0 and below the first of keep_rates (0.5,)"),
        ({"initial_keep_rate": 0.0}, "initial_keep_rate 0.0: must be above 0"),
        ({"repetitions": 0}, "repetitions 0: must be 1 or more"),
        ({"distance": "minkowski"}, "distance 'minkowski': there are cosine, manhattan, euclidean"),
        ({"num_prefix_tokens": -1}, "num_prefix_tokens=-1, num_suffix_tokens=0"),
    ],
)
def test_refuses(changed, words):
    given = {"steps": (0,), "keep_rates": (0.5,), "initial_keep_rate": 0.25, "repetitions": 2} | changed
    with pytest.raises(UserError) as caught:
        TokenExpansion(**given)
    assert words in str(caught.value)


def test_refuses_too_few_tokens():
    with pytest.raises(UserError, match=r"initial_keep_rate 0.25 of 3 tokens is none .* raise it to at least 0.333"):
        TokenExpansion((0,), (0.5,), 0.25, 2)(torch.randn(1, 4, 8))
