"""The blocks of a ViT as a start: exactly them, resized patch convolutions on request, or an error."""

import dataclasses

import huggingface_hub
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from pipeline.models.build import give_start, make_model
from pipeline.models.vittm import ViTTM
from pipeline.models.vittm.trunk import TRUNKS
from pipeline.recipe import Augment, Model, Recipe
from pipeline.validate import validate
from shards.errors import UserError

SMALL = Model(name="vittm_tiny", memory_ps=4, process_ps=8, embed_dim=24, depth=2, num_heads=3)


def vit(**options) -> torch.nn.Module:
    """A ViT with patches of 16 px, which started from other random numbers than the recipe's seed."""
    torch.manual_seed(5)
    shape = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", **shape | options)


@pytest.fixture
def started(tmp_path):
    """started(model section, the ViT) -> a new model, the model that it became, and what was said."""

    def run(section: Model, trunk: torch.nn.Module) -> tuple[ViTTM, ViTTM, str]:
        save_file(trunk.state_dict(), tmp_path / "vit.safetensors")
        recipe = Recipe(
            augment=Augment(image_size=32),
            model=dataclasses.replace(section, init_weights=str(tmp_path / "vit.safetensors")),
        )
        validate(recipe)
        new, model = make_model(recipe, num_classes=7), make_model(recipe, num_classes=7)
        return new, model, give_start(model, recipe.model)

    return run


def changed(new: ViTTM, model: ViTTM) -> dict[str, torch.Tensor]:
    before = new.state_dict()
    return {name: tensor for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_blocks_come_from_the_vit_and_nothing_else(started):
    trunk = vit()
    new, model, said = started(dataclasses.replace(SMALL, init_from="blocks"), trunk)
    theirs, ours = trunk.state_dict(), changed(new, model)
    assert {name.partition(".block.")[0] for name in ours} == {"layers.0", "layers.1"}
    for name, tensor in model.state_dict().items():
        if ".block." in name:
            assert torch.equal(tensor, theirs[name.replace("layers.", "blocks.").replace(".block.", ".")])
    assert "start weights blocks of" in said
    assert "vit.safetensors: 24 loaded; made new: memory_pos_embed, process_pos_embed, memory_embedder.proj" in said
    assert "layers.*.read_head.q.weight" in said
    assert said.endswith("dropped: cls_token, head.bias, head.weight, norm.bias, norm.weight, patch_embed.proj.bias, "
                         "patch_embed.proj.weight, pos_embed")  # fmt: skip


def test_flexi_resizes_the_patch_convolution_by_the_pseudo_inverse(started):
    trunk = vit()
    new, model, said = started(dataclasses.replace(SMALL, init_from="blocks+flexi"), trunk)
    outside = {name for name in changed(new, model) if ".block." not in name}
    assert outside == {f"{name}_embedder.proj.{kind}" for name in ("memory", "process") for kind in ("weight", "bias")}
    assert said.endswith("dropped: cls_token, head.bias, head.weight, norm.bias, norm.weight, pos_embed")
    units = torch.eye(256).unflatten(1, (1, 16, 16))
    for embedder, side in ((model.memory_embedder, 4), (model.process_embedder, 8)):
        rows = F.interpolate(units, size=(side, side), mode="bicubic", antialias=True, align_corners=False).flatten(1)
        kernel = trunk.patch_embed.proj.weight.detach().flatten(2)  # (D, C, 256)
        expected = torch.einsum("na,dca->dcn", torch.linalg.pinv(rows), kernel)
        torch.testing.assert_close(embedder.proj.weight.detach().flatten(2), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(embedder.proj.bias, trunk.patch_embed.proj.bias)


def test_flexi_without_a_process_convolution_and_at_the_same_size(started):
    trunk = vit()
    section = dataclasses.replace(SMALL, init_from="blocks+flexi", process_embedder_type="latent", memory_ps=16)
    new, model, _ = started(section, trunk)
    outside = {name for name in changed(new, model) if ".block." not in name}
    assert outside == {"memory_embedder.proj.weight", "memory_embedder.proj.bias"}
    assert torch.equal(model.memory_embedder.proj.weight, trunk.patch_embed.proj.weight)


def test_blocks_with_layer_scale_want_a_trunk_with_it(started):
    section = dataclasses.replace(SMALL, name="deittm_small", init_from="blocks")
    _, model, _ = started(section, vit(init_values=0.3))
    assert torch.equal(model.layers[1].block.ls2.gamma, torch.full((24,), 0.3))
    with pytest.raises(UserError) as raised:
        started(section, vit())
    assert "vit.safetensors has not the blocks of this model: 4 weights differ" in str(raised.value)
    assert "layers.0.block.ls1.gamma: file none, model (24,)" in str(raised.value)
    assert "give model.init_weights a ViT of the same width, depth and heads, with LayerScale" in str(raised.value)


@pytest.mark.parametrize(
    ("options", "misfit"),
    [({"depth": 3}, "layers.2.block.attn.proj.bias: file (24,), model none"),
     ({"embed_dim": 48}, "layers.0.block.attn.proj.bias: file (48,), model (24,)")],
)  # fmt: skip
def test_a_trunk_of_another_size_is_refused_whole(started, options, misfit):
    with pytest.raises(UserError) as raised:
        started(dataclasses.replace(SMALL, init_from="blocks"), vit(**options))
    assert misfit in str(raised.value)
    assert "Nothing was loaded" in str(raised.value)


def test_what_cannot_start_from_a_trunk(started):
    baseline = Model(name="vit_tiny_patch16_224", patch_size=8, embed_dim=24, depth=2, num_heads=3, init_from="blocks")
    with pytest.raises(UserError, match=r"starts a ViTTM with the blocks of a ViT, but the model is a VisionTransform"):
        started(baseline, vit())
    with pytest.raises(UserError, match=r"no ViT of timm belongs to model.name 'vit_tiny_patch16_224', only to vittm_"):
        give_start(vit(), Model(name="vit_tiny_patch16_224", init_from="blocks"))
    both = Recipe(model=Model(start="a.safetensors", init_from="blocks"))
    with pytest.raises(
        UserError, match=r"model.start 'a.safetensors' and model.init_from 'blocks': a model starts from"
    ):
        validate(both)
    with pytest.raises(
        UserError, match=r"model.init_weights 'b.safetensors' would not be looked at while model.init_fr"
    ):
        validate(Recipe(model=Model(init_weights="b.safetensors")))


def test_trunks_are_models_of_timm_with_the_blocks_of_that_size():
    assert [name for name, trunk in TRUNKS.items() if not timm.is_model_pretrained(trunk)] == []
    for name in ("vittm_tiny", "deittm_small"):
        with torch.device("meta"):
            ours, theirs = timm.create_model(name).state_dict(), timm.create_model(TRUNKS[name]).state_dict()
        blocks = {key.replace("blocks.", "layers."): tensor.shape for key, tensor in theirs.items() if "blocks" in key}
        found = {key.replace(".block.", "."): tensor.shape for key, tensor in ours.items() if ".block." in key}
        assert found == blocks, name


def test_a_trunk_that_cannot_be_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = ViTTM(img_size=32, memory_ps=4, process_ps=8, embed_dim=24, depth=2, num_heads=3)
    with pytest.raises(UserError) as raised:
        give_start(model, Model(name="vittm_tiny", init_from="blocks"))
    assert "timm's vit_tiny_patch16_224.augreg_in21k_ft_in1k, which cannot be downloaded here" in str(raised.value)
    assert "give the path of its model.safetensors as model.init_weights" in str(raised.value)


def test_without_a_start_it_says_so():
    assert give_start(vit(), Model()) == "start weights: none, every weight is new"
