"""Blocks that merge tokens are those of the specification, gradients too; and the mask by itself."""

from fractions import Fraction

import ltm_reference as reference
import pytest
import torch
from ltm_reference import FAMILIES
from torch import Tensor, nn

from pipeline.models.ltm.blocks import Merging
from pipeline.models.ltm.mask import MaskModule, middles

RATIO = Fraction(4, 5)


def gradients(model: nn.Module, given: Tensor, made: Tensor) -> list[Tensor]:
    """Of all weights that `made` comes of, and of `given`."""
    weights = [given, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    weight = torch.randn(made.shape, generator=torch.Generator().manual_seed(2), dtype=made.dtype)
    return [made, *torch.autograd.grad((made * weight).sum(), weights)]


def given_to(name: str, number: int, batch: int) -> Tensor:
    """What stage `number` of the small model gets."""
    model = reference.unlike(reference.build(name)).double()
    found: list[Tensor] = []
    model.chains()[number].register_forward_pre_hook(lambda stage, inputs: found.append(inputs[0].detach()))
    model(reference.images(name, batch).double())
    return found[0].requires_grad_()


STAGES = [("ltm_vit_small", 0), *((name, number) for name in FAMILIES[1:] for number in (0, 1))]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("name", "number"), STAGES)
def test_a_stage_is_that_of_the_specification(name, number, batch):
    stage = reference.unlike(reference.build(name)).double().chains()[number]
    x = given_to(name, number, batch)
    head = [block for block in stage if not isinstance(block, Merging)]
    start = nn.Sequential(*head)(x)
    samples = []
    for sample in start:
        masks = None
        for block in stage:
            if isinstance(block, Merging):
                sample, masks = reference.BLOCKS[name](block, sample, masks)
        samples.append(sample)
    expected = gradients(stage, x, torch.stack(samples))
    torch.testing.assert_close(gradients(stage, x, stage(x)), expected, rtol=1e-6, atol=1e-7)


def test_sizes_are_exact():
    """0.8 * 245 is 196.00000000000003 in floats."""
    module = MaskModule(Fraction("0.8"), takes_previous=False)
    assert [module.num_merged(number) for number in (1, 4, 49, 196, 245)] == [1, 4, 40, 157, 196]
    assert MaskModule(Fraction("0.3"), takes_previous=False).num_merged(10) == 3


def test_anchors_are_in_the_middles_of_equal_parts():
    assert middles(12, 3, torch.device("cpu")).tolist() == [2, 6, 10]
    assert middles(5, 4, torch.device("cpu")).tolist() == [0, 1, 3, 4]
    assert middles(7, 7, torch.device("cpu")).tolist() == list(range(7))


def test_the_mask_is_exactly_hard_and_its_columns_are_shares():
    torch.manual_seed(0)
    tokens = torch.randn(3, 49, 8)
    mask = MaskModule(RATIO, takes_previous=False)(tokens)
    assert mask.hard.unique().tolist() == [0, 1]
    assert (mask.hard.sum(dim=2) == 1).all()
    torch.testing.assert_close(mask.merging.sum(dim=1), torch.ones(3, 40))
    assert torch.equal(mask.merging != 0, mask.hard == 1)
    assert mask.merge(tokens).shape == (3, 40, 8)
    assert torch.equal(mask.unmerge(mask.merge(tokens)), mask.hard @ mask.merge(tokens))
    assert torch.equal(mask.merges().dense(40), mask.merging)


@pytest.mark.parametrize("tokens", [torch.ones(2, 10, 4), torch.zeros(2, 10, 4)])
def test_equal_tokens_leave_no_group_empty(tokens):
    """All would choose the first."""
    module, tokens = MaskModule(RATIO, takes_previous=False), tokens.clone().requires_grad_()
    merged = module(tokens).merge(tokens)
    assert torch.equal(merged, tokens[:, :8])
    merged.square().sum().backward()
    assert tokens.grad.isfinite().all()
    assert module.log_tau.grad.isfinite().all()


def test_a_mask_before_that_outweighs_all_else_gives_no_nan():
    module = MaskModule(RATIO, takes_previous=True)
    nn.init.constant_(module.scalar, 1e4)
    tokens = torch.randn(1, 10, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = MaskModule(RATIO, takes_previous=False)(tokens.flip(1)).merges()
    mask = module(tokens, before)
    mask.merge(tokens).square().sum().backward()
    assert mask.merging.isfinite().all()
    assert all(tensor.grad.isfinite().all() for tensor in (tokens, module.log_tau, module.scalar))


def test_under_autocast_the_mask_and_what_it_merges_keep_their_precision():
    module, tokens = MaskModule(RATIO, takes_previous=False), torch.randn(2, 20, 8)
    expected = module(tokens).merge(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(tokens).merge(tokens), expected)
    rounded = tokens.bfloat16()
    assert module(rounded).merging.dtype == torch.float32
    assert module(rounded).merge(rounded).dtype == torch.bfloat16
