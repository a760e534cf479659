"""The weights that attention_maps gives are those by which the heads take their averages."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.models.vittm import ViTTM
from pipeline.models.vittm.attention import attention_maps, head_type
from shards.errors import UserError

VALUES = {  # of the average, by head: (head, source) -> (B, N, D)
    "lin": lambda head, source: F.linear(source, head.v.weight, head.v.bias),
    "ca": lambda head, source: head.v_norm(head.v(source)),
    "la": lambda head, source: source,
    "lca": lambda head, source: head.v_norm(head.v(source)),
}


def model_of(small_options, **options) -> ViTTM:
    """A model in float64 whose heads, unlike fresh ones, prefer some tokens."""
    torch.manual_seed(1)
    model = ViTTM(**small_options | options).eval()
    for name, weight in model.layers.named_parameters():
        if "_head." in name:
            torch.nn.init.normal_(weight, mean=2.0 if name.endswith("norm.weight") else 0.0, std=0.5)
    return model.double()


def calls_of(model, images) -> list[tuple]:
    """(head, source, output) of every read and write of a forward pass, in order."""
    calls = []
    heads = [head for layer in model.layers for head in (layer.read_head, layer.write_head)]
    for head in heads:
        head.register_forward_hook(
            lambda head, _, streams, output: calls.append((head, streams["source"], output)), with_kwargs=True
        )
    model(images)
    return calls


@pytest.mark.parametrize("name", VALUES)
def test_weighted_values_are_what_the_head_gives(small_options, name):
    model, images = model_of(small_options, rw_head_type=name), torch.randn(2, 3, 32, 32).double()
    assert head_type(model) == name
    maps = attention_maps(model, images)
    assert not any(module._forward_hooks for module in model.modules())
    num_heads = 1 if name == "la" else 3
    assert [layer.read.shape for layer in maps] == 2 * [(2, num_heads, 16, 64)]
    assert [layer.write.shape for layer in maps] == 2 * [(2, num_heads, 64, 16)]
    with torch.no_grad():
        calls = calls_of(model, images)
        for weights, (head, source, output) in zip([side for layer in maps for side in layer], calls, strict=True):
            assert (weights.sum(dim=-1) - 1).abs().max() < 1e-5  # lin adds 1e-6 to what it divides by
            assert weights.min() >= 0
            assert weights.max() > 1.4 / weights.shape[-1]
            values = VALUES[name](head, source).unflatten(-1, (num_heads, -1)).transpose(1, 2)
            taken = (weights @ values).transpose(1, 2).flatten(2)
            taken = head.proj(taken) if hasattr(head, "proj") else taken
            torch.testing.assert_close(taken, output)


def test_another_resolution_has_more_tokens(small_options):
    maps = attention_maps(model_of(small_options), torch.randn(1, 3, 48, 48).double())
    assert maps[0].read.shape == (1, 3, 36, 144)


def test_conv_memory_is_written_to_while_it_is_short(small_options):
    maps = attention_maps(model_of(small_options, memory_blocks="conv"), torch.randn(1, 3, 32, 32).double())
    assert maps[1].read.shape == (1, 3, 16, 64)
    assert maps[1].write.shape == (1, 3, 32, 16)


@pytest.mark.parametrize("name", ["tl", "dyna"])
def test_heads_without_attention(small_options, name):
    model = ViTTM(**small_options, rw_head_type=name, dyna_num_heads=3)
    with pytest.raises(UserError) as raised:
        attention_maps(model, torch.randn(1, 3, 32, 32))
    assert str(raised.value) == (
        f"rw_head_type='{name}' has no attention to show: it makes its weights without comparing the token that asks "
        "with those that it reads; give a model with one of the heads lin, ca, la, lca."
    )
