"""Parameter groups: everything in exactly one, by name, and layer decay in the learning rate."""

import pytest
import timm
import torch
from torch import nn

import pipeline.models  # noqa: F401 - fills the registry
from pipeline import optim
from pipeline.backend import StepOptions, wrap
from pipeline.optim.groups import check_partition
from pipeline.optim.table import OPTIMIZERS
from pipeline.recipe import Optimizer, Shampoo


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


def decays(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Name -> scale of the learning rate, and weight decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group.get("lr_scale", 1.0), group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("name", ["vittm_tiny", "deit_tiny_distilled_patch16_224"])
def test_matrices_decay_as_timm_has_it(name, layer_decay):
    model = timm.create_model(name, depth=2, embed_dim=24, num_heads=3)
    section = Optimizer(weight_decay=0.3, decay="matrices", layer_decay=layer_decay)
    found = decays(model, optim.make_optimizer(model, section, optim.group(model, layer_decay, section.decay)))
    scaled = None if layer_decay == 1 else layer_decay
    assert found == decays(model, timm.optim.create_optimizer_v2(model, "adamw", 1e-3, 0.3, layer_decay=scaled))
    undecayed = {each for each, (_, decay) in found.items() if decay == 0}
    vectors = {each for each, parameter in model.named_parameters() if parameter.ndim == 1}
    assert undecayed == vectors | ({*found} & model.no_weight_decay())
    assert {*found} & model.no_weight_decay()
    assert {decay for _, decay in found.values()} == {0.0, 0.3}


def test_a_model_that_names_nothing_leaves_vectors_undecayed():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert optim.group(model, 1.0, "matrices").undecayed == {"0.bias", "1.weight", "1.bias"}
    assert optim.group(model, 1.0).undecayed == frozenset()


@pytest.mark.parametrize("name", [*OPTIMIZERS])
def test_by_every_optimizer_what_is_undecayed_stays_where_gradients_are_zero(name):
    model = vittm(depth=1).double() if name == "shampoo" else vittm(depth=1)
    shampoo = Shampoo(max_preconditioner_dim=40, precondition_frequency=1, start_preconditioning_step=1)
    section = Optimizer(name.replace("NAME", "DiffGrad"), weight_decay=0.1, decay="matrices", shampoo=shampoo)
    groups = optim.group(model, 0.5, section.decay)
    optimizer = optim.make_optimizer(model, section, groups)
    before = {each: parameter.detach().clone() for each, parameter in model.named_parameters()}
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    moved = {each for each, parameter in model.named_parameters() if not torch.equal(parameter, before[each])}
    assert moved == {each for each in before if before[each].any()} - groups.undecayed
    assert 0 < len(groups.undecayed) < len(before)
    assert any(before[each].any() for each in groups.undecayed)


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
