"""ViTTM is a model of timm: feature maps, parameter groups, classifiers, pruning, preprocessing."""

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import LayerScale
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor
from variants import SMALL, build, images

import pipeline.models  # noqa: F401 - fills the registry
from pipeline.models.vittm import ViTTM
from shards.errors import UserError

DEPTH = 4


@pytest.fixture(params=[{}, {"global_pool": "token", "memory_blocks": "mlp"}], ids=str)
def model(request: pytest.FixtureRequest) -> ViTTM:
    return build(request.param, depth=DEPTH).eval()


def by_hand(model: ViTTM, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Memory and process tokens after each layer."""
    memory, process = model.embed(x)
    memories, processes = [], []
    for layer in model.layers:
        memory, process = layer(memory, process, model.read_fusion, model.write_fusion)
        memories.append(memory)
        processes.append(process)
    return memories, processes


@pytest.mark.parametrize(("indices", "taken"), [(None, [0, 1, 2, 3]), (2, [2, 3]), ([0, 2], [0, 2]), ([-1], [3])])
@torch.no_grad()
def test_forward_intermediates_takes_the_layers_asked_for(model, indices, taken):
    x = images(height=32, width=48)
    memories, _ = by_hand(model, x)
    features, tokens = model.forward_intermediates(x, indices=indices, output_fmt="NLC")
    torch.testing.assert_close(features, model.forward_features(x), rtol=0, atol=0)
    torch.testing.assert_close(tokens, [memories[i] for i in taken], rtol=0, atol=0)
    maps = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    assert [tuple(found.shape) for found in maps] == [(2, 48, 8, 12)] * len(taken)
    for found, i in zip(maps, taken, strict=True):
        torch.testing.assert_close(found[:, :, 3, 5], memories[i][:, 3 * 12 + 5], rtol=0, atol=0)


@torch.no_grad()
def test_forward_intermediates_norm_early_stop_and_dictionary(model):
    x = images()
    memories, processes = by_hand(model, x)
    features, maps = model.forward_intermediates(x, indices=[1], norm=True, stop_early=True, output_fmt="NLC")
    expected = model.norm(memories[1]), model.process_norm(processes[1])
    torch.testing.assert_close(features, expected, rtol=0, atol=0)
    torch.testing.assert_close(maps, [model.norm(memories[1])], rtol=0, atol=0)
    options = {"indices": [1], "norm": True, "output_fmt": "NLC", "output_dict": True}
    found = model.forward_intermediates(x, **options)
    assert found.keys() == {"image_features", "image_intermediates"}
    torch.testing.assert_close(found["image_features"], model.forward_features(x), rtol=0, atol=0)
    torch.testing.assert_close(found["image_intermediates"], maps, rtol=0, atol=0)
    alone = model.forward_intermediates(x, intermediates_only=True, **options)
    assert alone.keys() == {"image_intermediates"}
    assert (model.norm(memories[1]) != memories[1]).any() == (model.global_pool == "token")
    with pytest.raises(UserError, match="output_fmt='NHWC' is not available in ViTTM; it has 'NCHW', 'NLC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


@torch.no_grad()
def test_features_only():
    options = SMALL | {"depth": DEPTH}
    torch.manual_seed(0)
    whole = timm.create_model("vittm_tiny", **options).eval()
    torch.manual_seed(0)
    backbone = timm.create_model("vittm_tiny", features_only=True, out_indices=(0, 2), **options).eval()
    assert isinstance(backbone, FeatureGetterNet)
    assert backbone.feature_info.channels() == [48, 48]
    assert backbone.feature_info.reduction() == [4, 4]
    assert len(backbone.model.layers) == 3
    expected = whole.forward_intermediates(images(), indices=(0, 2), intermediates_only=True)
    torch.testing.assert_close(backbone(images()), expected, rtol=0, atol=0)
    assert len(timm.create_model("vittm_tiny", features_only=True, **options)(images())) == 3


@torch.no_grad()
def test_pruning_keeps_what_the_features_need(model):
    features, maps = model.forward_intermediates(images(), indices=[0, 2], stop_early=True)
    assert model.prune_intermediate_layers([0, 2], prune_norm=False, prune_head=True) == [0, 2]
    assert len(model.layers) == 3
    assert (model.num_classes, list(model.head.parameters())) == (0, [])
    torch.testing.assert_close(model.forward_intermediates(images(), indices=[0, 2]), (features, maps), rtol=0, atol=0)
    assert model.prune_intermediate_layers(1, prune_norm=True, prune_head=False) == [2]
    assert [tokens.shape for tokens in model.forward_features(images())] == [(2, 64, 48), (2, 16, 48)]
    assert not any(norm.state_dict() for norm in (model.norm, model.process_norm))


@pytest.mark.parametrize("variant", [{}, {"process_embedder_type": "latent", "fusion_type": "add_erase"}], ids=str)
def test_layer_decay_groups_every_parameter_once_by_its_depth(variant):
    model = build(variant, depth=DEPTH)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {}
    for group in param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5):
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            scales[name] = group["lr_scale"]
            undecayed = name in model.no_weight_decay() or parameter.ndim == 1
            assert group["weight_decay"] == (0 if undecayed else 0.05)
    assert names == {}
    assert scales == {name: 0.5 ** (DEPTH + 1 - _depth(name)) for name in scales}


def _depth(name: str) -> int:
    """0 for the stem, then the layers, and last what classifies; the last norms go with the last layer."""
    root, *rest = name.split(".")
    if root == "layers":
        return int(rest[0]) + 1
    if root in ("norm", "process_norm"):
        return DEPTH
    return DEPTH + 1 if root in ("fc_norm", "fc_norm_process", "head", "process_head") else 0


def test_timm_makes_optimizers_for_it():
    model = build({"process_embedder_type": "latent", "global_pool": "token"})
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.05, layer_decay=0.7)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("coarse", [True, False])
def test_group_matcher_puts_shared_fusions_into_the_stem(coarse):
    model = build({"fusion_type": "add_erase"})
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
    assert {name.split(".")[0] for name in groups[0]} == {
        "memory_embedder", "process_embedder", "memory_pos_embed", "process_pos_embed", "read_fusion", "write_fusion",
    }  # fmt: skip
    assert sorted(name for group in groups.values() for name in group) == sorted(dict(model.named_parameters()))


def test_classifiers_can_be_replaced_and_read():
    model = build({}).double()
    assert model.get_classifier() == (model.head, model.process_head)
    assert isinstance(model.norm, torch.nn.Identity)
    model.reset_classifier(3, global_pool="token")
    assert model.get_classifier() == (model.head, model.process_head)
    assert [answer.shape for answer in model(images().double())] == [(2, 3), (2, 3)]
    assert [parameter for parameter in model.parameters() if parameter.dtype != torch.float64] == []
    torch.manual_seed(0)
    fresh = ViTTM(**SMALL | {"global_pool": "token", "num_classes": 3})
    assert model.state_dict().keys() == fresh.state_dict().keys()
    with pytest.raises(UserError, match="global_pool='' is not available in ViTTM; it has 'avg', 'token'"):
        model.reset_classifier(0, "")


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_deittm_has_layer_scale_from_small_up(size):
    with torch.device("meta"):
        vittm, deittm = (timm.create_model(f"{family}_{size}") for family in ("vittm", "deittm"))
    scales = {name: module for name, module in deittm.named_modules() if isinstance(module, LayerScale)}
    expected = [f"layers.{i}.block.{scale}" for i in range(len(vittm.layers)) for scale in ("ls1", "ls2")]
    assert list(scales) == ([] if size == "tiny" else expected)
    assert all(scale.init_values == 1e-6 for scale in scales.values())
    assert [(gamma == 1e-6).all() for gamma in _gammas(f"deittm_{size}")] == [True, True] * (size != "tiny")
    shapes, of_vittm = ({name: w.shape for name, w in model.state_dict().items()} for model in (deittm, vittm))
    assert {name: shape for name, shape in shapes.items() if not name.endswith(".gamma")} == of_vittm


def _gammas(name: str) -> list[Tensor]:
    model = timm.create_model(name, depth=1, embed_dim=48, num_heads=3)
    return [weight for name, weight in model.named_parameters() if name.endswith("gamma")]


def test_preprocessing_is_that_of_the_recipes_evaluation():
    config = resolve_model_data_config(timm.create_model("vittm_tiny", depth=1))
    assert (config["input_size"], config["interpolation"], config["crop_pct"]) == ((3, 224, 224), "bicubic", 224 / 256)
    assert (config["mean"], config["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
