"""Start weights are exactly those of the file, or an error."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from pipeline.models.load import load_start
from pipeline.models.vittm import ViTTM
from shards.errors import UserError

HEADS = ["head.bias", "head.weight", "process_head.bias", "process_head.weight"]


@pytest.fixture
def stored(small, tmp_path):
    """A file with the weights of a small model for 7 classes, whose heads are ones."""
    for head in small.get_classifier():
        torch.nn.init.ones_(head.weight)
    save_file(small.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def _error(model, path, new_heads=False) -> str:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as raised:
        load_start(model, path, new_heads=new_heads)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return str(raised.value)


def test_all_weights(small_options, small, stored):
    model = ViTTM(**small_options)
    result = load_start(model, stored, new_heads=False)
    assert set(result.loaded) == small.state_dict().keys()
    assert result.made_new == result.dropped == ()
    assert all(torch.equal(small.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("num_classes", [7, 3])
def test_new_heads_stay_zero_whatever_the_file_has(small_options, small, stored, num_classes):
    model = ViTTM(**small_options | {"num_classes": num_classes})
    result = load_start(model, stored, new_heads=True)
    assert sorted(result.made_new) == list(result.dropped) == HEADS
    assert not any(head.weight.any() for head in model.get_classifier())
    assert torch.equal(model.layers[1].write_head.v.weight, small.layers[1].write_head.v.weight)


def test_models_of_timm_have_heads_too(tmp_path):
    model = timm.create_model("test_vit", num_classes=3)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    result = load_start(timm.create_model("test_vit", num_classes=5), tmp_path / "vit.safetensors", new_heads=True)
    assert sorted(result.made_new) == list(result.dropped) == ["head.bias", "head.weight"]


def test_other_classes_without_new_heads_are_an_error(small_options, stored):
    error = _error(ViTTM(**small_options | {"num_classes": 3}), stored)
    assert f"{stored} is a checkpoint of another model: 4 weights differ" in error
    assert "  head.weight: file (7, 24), model (3, 24)" in error
    assert "Nothing was loaded; only the classifiers differ: ask for new heads" in error


def test_another_model_is_named_by_its_first_five_misfits(small_options, stored):
    error = _error(ViTTM(**small_options | {"depth": 1, "memory_ps": 8}), stored, new_heads=True)
    shown = [line for line in error.splitlines() if ": file (" in line]
    assert len(shown) == 5
    assert "  layers.1.block.attn.proj.bias: file (24,), model none" in shown
    assert "more\nNothing was loaded; build the model with the options that the file was trained with" in error


def test_missing_weights_are_named(small, tmp_path):
    weights = {name: tensor for name, tensor in small.state_dict().items() if name != "process_norm.bias"}
    save_file(weights, tmp_path / "part.safetensors")
    assert "  process_norm.bias: file none, model (24,)" in _error(small, tmp_path / "part.safetensors")


def test_files_that_are_missing_or_not_safetensors(small, tmp_path):
    assert "gone.safetensors: no such file; start weights are one .safetensors file" in _error(
        small, tmp_path / "gone.safetensors"
    )
    torch.save(small.state_dict(), tmp_path / "model.pt")
    error = _error(small, tmp_path / "model.pt")
    assert "model.pt is not a safetensors file (" in error
    assert "may run code when opened" in error


def test_tables_of_another_image_size_are_resized_as_the_model_does_itself(small_options, small, stored):
    large = ViTTM(**small_options | {"img_size": 2 * small_options["img_size"]}).eval()
    result = load_start(large, stored, new_heads=False)
    assert result.resized == ("memory_pos_embed", "process_pos_embed")
    assert set(result.loaded) | set(result.resized) == large.state_dict().keys()
    images = torch.randn(2, 3, *[2 * small_options["img_size"]] * 2)
    assert torch.allclose(large(images), small.eval()(images), atol=1e-5)


def test_tables_of_timms_models_keep_their_prefix(tmp_path):
    model = timm.create_model("test_vit", num_classes=3, img_size=64).eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    large = timm.create_model("test_vit", num_classes=3, img_size=96).eval()
    assert load_start(large, tmp_path / "vit.safetensors", new_heads=False).resized == ("pos_embed",)
    model.set_input_size((96, 96))
    images = torch.randn(2, 3, 96, 96)
    assert torch.allclose(large(images), model(images), atol=1e-5)


def test_weights_sized_by_tokens_are_another_model(small_options, tmp_path):
    options = small_options | {"fusion_type": "add_erase"}
    save_file(ViTTM(**options).state_dict(), tmp_path / "model.safetensors")
    large = ViTTM(**options | {"img_size": 2 * small_options["img_size"]})
    assert "fusion" in _error(large, tmp_path / "model.safetensors", new_heads=True)
