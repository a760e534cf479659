"""T2T-ViT's own behaviour: its options, images of any size, timm's interface, one graph, less memory."""

import pytest
import timm
import torch
from graphs import check_compiles, check_exports
from timm.layers import resample_abs_pos_embed
from timm.optim import param_groups_layer_decay
from torch import nn
from variants import images, step

import pipeline.models  # noqa: F401 - fills the registry
from pipeline.models.t2t_vit import T2TViT
from pipeline.models.t2t_vit.tokens import PerformerLayer
from shards.errors import UserError

SMALL = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "token_dim": 8, "num_classes": 7}
TOKENS_TYPES = ("transformer", "performer")


def build(tokens_type: str = "transformer", **options: object) -> T2TViT:
    torch.manual_seed(0)
    return T2TViT(**SMALL | {"tokens_type": tokens_type} | options)


@pytest.fixture(params=TOKENS_TYPES)
def model(request: pytest.FixtureRequest) -> T2TViT:
    return build(request.param)


@pytest.mark.parametrize(("height", "width", "grid"), [(32, 64, (2, 4)), (50, 33, (3, 2)), (3, 16, (1, 1))])
@torch.no_grad()
def test_images_of_any_size_take_the_interpolated_table(model, height, width, grid):
    model.eval()
    given = images(height=height, width=width)
    tokens = model.tokens_to_token(given)
    assert tokens.shape == (2, grid[0] * grid[1], 24)
    table = resample_abs_pos_embed(model.pos_embed, list(grid), [2, 2])
    sequence = torch.cat([model.cls_token.expand(2, -1, -1), tokens], dim=1) + table
    torch.testing.assert_close(model.forward_features(given), model.norm(model.blocks(sequence)), rtol=0, atol=0)
    (last,) = model.forward_intermediates(given, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(last.flatten(2).mT, model.forward_features(given)[:, 1:], rtol=0, atol=0)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"image size 2x32 is too small for T2T-ViT.*at least 3 pixels a side"):
        build(img_size=(2, 32))
    with pytest.raises(UserError, match=r"image size 2x2 is too small"):
        build()(torch.zeros(1, 3, 2, 2))
    with pytest.raises(UserError, match=r"tokens_type='convolution' is not available.*transformer, performer"):
        build("convolution")
    with pytest.raises(UserError, match="num_heads=5 does not divide embed_dim=24"):
        build(num_heads=5)
    with pytest.raises(UserError, match="token_dim=1, but a token of the T2T module is at least 2 wide"):
        build(token_dim=1)
    with pytest.raises(TypeError, match="patch_size"):
        build(patch_size=16)


@torch.no_grad()
def test_published_weights_take_another_scale_of_the_blocks():
    """Queries are scaled by weights as well as by the option: softmax((s q) k) is softmax(s (q k))."""
    given, ours, theirs = images(), build().eval(), build(qk_scale=24**-0.5).eval()
    assert not torch.allclose(ours(given), theirs(given))
    for block in ours.blocks:
        block.attn.qkv.weight[:24] *= 3**-0.5  # D^-0.5 over (D / 3)^-0.5
    torch.testing.assert_close(ours(given), theirs(given))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@torch.no_grad()
def test_a_performer_layer_estimates_softmax_attention():
    """With many features its attention comes near that of softmax(q k^T), which arXiv 2009.14794 proves."""
    layer = PerformerLayer(8, 8)
    torch.manual_seed(0)
    layer.w = torch.randn(2**18, 8)
    query, key, value = torch.randn(3, 1, 50, 8).mul(0.4)
    expected = torch.softmax(query @ key.mT, dim=-1) @ value
    assert (expected - value.mean(dim=1)).abs().max() > 0.09
    torch.testing.assert_close(layer.attend(query, key, value), expected, rtol=0, atol=0.02)


@torch.no_grad()
def test_random_features_are_orthogonal_and_part_of_the_weights():
    model = build("performer", token_dim=16)
    features = model.tokens_to_token.attention1.w
    torch.testing.assert_close(features @ features.T, 8 * torch.eye(8))
    assert "tokens_to_token.attention2.w" in model.state_dict()
    assert not any(name.endswith(".w") for name, _ in model.named_parameters())


def test_weights_begin_as_the_authors_draw_them(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            assert 0.014 < parameter.std() < 0.026, name
            assert parameter.abs().max() < 0.1


def test_drop_path_grows_to_the_last_block():
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in build(depth=3, drop_path_rate=0.1).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1])


@torch.no_grad()
def test_timms_interface(model):
    model.eval()
    features = model.forward_features(images())
    assert features.shape == (2, 5, 24)
    assert model.forward_head(features, pre_logits=True).shape == (2, 24)
    torch.testing.assert_close(model.forward_head(features), model(images()), rtol=0, atol=0)
    tokens = model.get_intermediate_layers(images(), n=[0, 1], norm=True)
    torch.testing.assert_close(tokens[1], features[:, 1:], rtol=0, atol=0)
    assert (model.num_features, model.num_classes, model.get_classifier().out_features) == (24, 7, 7)
    model.reset_classifier(3)
    assert model(images()).shape == (2, 3)
    backbone = timm.create_model("t2t_vit_t_7", features_only=True, out_indices=(0, 2), **SMALL | {"depth": 3})
    assert (backbone.feature_info.channels(), backbone.feature_info.reduction()) == ([24, 24], [16, 16])
    assert [tuple(found.shape) for found in backbone(images(height=32, width=48))] == [(2, 24, 2, 3)] * 2


def test_layer_decay_and_what_does_not_decay(model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5):
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            depth = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0
            depth = {"norm": 2, "head": 3}.get(name.split(".")[0], depth)
            assert group["lr_scale"] == 0.5 ** (3 - depth), name
            assert group["weight_decay"] == (0 if parameter.ndim == 1 or name == "cls_token" else 0.05), name
    assert names == {}


def test_is_one_graph(model):
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):  # aot_eager, not inductor, fails at dropouts with transposed gradients
            layer.p = 0.0
    check_compiles(model, "aot_eager")
    check_exports(model, any_batch=True)


def test_checkpointing_computes_the_same(model):
    expected = step(model)
    model.set_grad_checkpointing()
    torch.testing.assert_close(step(model), expected, rtol=0, atol=0)


def test_trains_in_bfloat16(model):
    expected = step(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(model)
    assert found["memory"].dtype == torch.bfloat16
    for name, tensor in expected.items():
        assert (found[name].float() - tensor).norm() <= 0.05 * tensor.norm() + 1e-3, name
