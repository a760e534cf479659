"""Parameter groups: everything in exactly one, by name, and layer decay in the learning rate."""

import pytest
import timm
import torch
from torch import nn

from pipeline import optim
from pipeline.backend import StepOptions, wrap
from pipeline.optim.groups import check_partition
from pipeline.recipe import Optimizer


def vittm(depth: int = 3) -> nn.Module:
    return timm.create_model(
        "vittm_tiny", num_classes=5, img_size=16, memory_ps=4, process_ps=8, embed_dim=24, depth=depth, num_heads=3
    )


def test_layer_decay_falls_towards_the_input():
    groups = optim.group(vittm(depth=3), 0.5)
    scales = {
        "memory_pos_embed": 0.0625,
        "process_embedder.proj.weight": 0.0625,
        "layers.0.read_head.q.weight": 0.125,
        "layers.1.block.norm1.bias": 0.25,
        "layers.2.block.mlp.fc1.weight": 0.5,
        "process_norm.weight": 0.5,
        "head.weight": 1.0,
        "process_head.bias": 1.0,
    }
    assert {name: groups.scales[name] for name in scales} == scales
    assert set(optim.group(vittm(depth=3), 1.0).scales.values()) == {1.0}


def test_layer_decay_reaches_the_learning_rate_whatever_the_schedule(alone):
    model = vittm(depth=2)
    section = Optimizer(layer_decay=0.5, weight_decay=0.1)
    groups = optim.group(model, section.layer_decay)
    backend = wrap(alone, model, lambda m: optim.make_optimizer(m, section, groups), StepOptions(4))
    for lr in (0.8, 0.4):
        backend.set_lr(lr)
        rates = [(group["lr"], group["weight_decay"]) for group in backend.optimizer.param_groups]
        assert rates == [(lr / 8, 0.1), (lr / 4, 0.1), (lr / 2, 0.1), (lr, 0.1)]
    backend.close()


def test_every_parameter_decays():
    model = vittm()
    optimizer = optim.adamw(model, (0.9, 0.999), 1e-8, 0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3]
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_hidden_weights_are_those_of_linear_layers_but_for_the_classifiers():
    model = vittm()
    groups = optim.group(model, 1.0)
    assert {"layers.0.read_head.q.weight", "layers.2.block.attn.qkv.weight"} <= groups.hidden
    assert groups.hidden.isdisjoint({"head.weight", "process_head.weight", "memory_pos_embed"})
    assert all(model.get_parameter(name).ndim == 2 for name in groups.hidden)
    split = groups.bind(model, split_hidden=True)
    assert sorted(group["use_fallback"] for group in split) == [False, True]
    hidden = next(group for group in split if not group["use_fallback"])
    assert len(hidden["params"]) == len(groups.hidden)


def test_what_is_frozen_is_in_no_group():
    model = vittm()
    model.memory_pos_embed.requires_grad_(False)
    groups = optim.group(model, 0.5)
    optimizer = optim.make_optimizer(model, Optimizer(), groups)
    assert "memory_pos_embed" not in groups.scales
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters())) - 1


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["weight"], r"bias is in 0 groups"),
        (["weight", "bias", "bias"], r"bias is in 2 groups"),
        (["weight", "bias", "stranger"], r"1 tensors are no trainable parameters of the model"),
    ],
)
def test_a_parameter_that_is_missing_or_in_two_groups_is_found(chosen, message):
    model = nn.Linear(2, 2)
    tensors = dict(model.named_parameters()) | {"stranger": nn.Parameter(torch.zeros(1))}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer.param_groups = [{"params": [tensors[name]]} for name in chosen]
    with pytest.raises(AssertionError, match=message):
        check_partition(model, optimizer)
