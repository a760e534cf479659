"""LTM's models: timm's at ratio 1, and of timm's weights; timm's interface, graphs, memory, precision; refusals."""

import copy

import ltm_reference as reference
import pytest
import timm
import torch
from graphs import check_exports
from ltm_reference import FAMILIES, SMALL
from safetensors.torch import save_file
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch._dynamo.utils import counters

from pipeline.backend.layers import prepare_layers
from pipeline.models.build import make_model
from pipeline.models.load import load_start
from pipeline.models.ltm.sizes import BASES
from pipeline.optim import group
from pipeline.recipe import Augment, Model, Recipe
from shards.errors import UserError

SHALLOW = {"vit": {"img_size": 32, "depth": 2}, "swin": {"img_size": 32, "window_size": 4, "depths": (1, 1, 1, 1)}}


def shallow(name: str, made_of: str, **more: object) -> nn.Module:
    """Of the model's own widths."""
    torch.manual_seed(0)
    options = next((sizes for kind, sizes in SHALLOW.items() if kind in made_of.split("_")), {})
    return timm.create_model(name, num_classes=3, **options, **more)


def trained(model: nn.Module, given: Tensor) -> dict[str, Tensor]:
    """Answers, and the gradients of all weights."""
    torch.manual_seed(2)  # of what is dropped
    model.zero_grad()
    answers = model(given)
    nn.functional.cross_entropy(answers, torch.arange(len(answers))).backward()
    return {"answers": answers, **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize(("name", "base"), BASES.items())
def test_ratio_1_is_the_base_to_the_bit_and_its_weights_load(name, base):
    """In training, as timm starts it; and merging begins with all of the base's weights."""
    with torch.device("meta"):
        weights = timm.create_model(base).state_dict()
        whole, merging = timm.create_model(name, compression_ratio=1), timm.create_model(name)
    assert {key: tensor.shape for key, tensor in whole.state_dict().items()} == {
        key: tensor.shape for key, tensor in weights.items()
    }
    assert merging.state_dict().keys() - weights.keys() == set(merging.mask_names())
    assert sum(tensor.numel() for tensor in merging.parameters()) < sum(map(Tensor.numel, whole.parameters())) + 50
    of_timm, ours, other = shallow(base, name), shallow(name, name, compression_ratio=1), shallow(name, name)
    given = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(trained(ours, given), trained(of_timm, given), rtol=0, atol=0)
    assert ours.merge_map() == []
    before = [other.get_parameter(key).clone() for key in other.mask_names()]
    with torch.no_grad():
        for tensor in of_timm.parameters():
            tensor.add_(1)
    other.load_state_dict(of_timm.state_dict())
    for key, tensor in of_timm.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)
    assert [other.get_parameter(key) for key in other.mask_names()] == before


def test_pretrained_weights_are_those_of_the_base():
    assert {name: timm.get_pretrained_cfg(name).hf_hub_id for name in BASES} == {
        name: timm.get_pretrained_cfg(base).hf_hub_id for name, base in BASES.items()
    }
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
    base = timm.create_model("vit_small_patch16_224", **options)
    cfg = {"state_dict": base.state_dict(), "num_classes": 7, "classifier": "head", "input_size": (3, 32, 32)}
    model = timm.create_model("ltm_vit_small", pretrained=True, pretrained_cfg=cfg, **options)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, base.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_every_weight(name):
    found = trained(reference.build(name), reference.images(name))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values()), found.keys()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_sample_alone_is_that_of_a_batch(name):
    model = reference.unlike(reference.build(name)).eval()
    torch.testing.assert_close(model(reference.images(name, 3))[1:2], model(reference.images(name, 3)[1:2]))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_masks_are_kept_in_evaluation_alone(name):
    model = reference.build(name)
    model(reference.images(name))
    assert model.merge_map() == []
    model.eval()(reference.images(name))
    sizes = {
        "ltm_vit_small": [(2, 16, 13), (2, 13, 11), (2, 11, 9)],
        "ltm_swin_tiny": [(18, 16, 13)] * 2 + [(8, 9, 8)] * 2,
        "ltm_mobilevit_xs": [(8, 36, 29)] * 2 + [(8, 9, 8)] * 4 + [(8, 4, 4)] * 3,
        "ltm_efficientvit_b1": [(2, 16, 13)] * 3 + [(2, 4, 4)] * 4,
    }
    assert [tuple(mask.shape) for mask in model.merge_map()] == sizes[name]
    assert all(((mask > 0).sum(dim=2) == 1).all() for mask in model.merge_map())
    other = copy.deepcopy(model)
    assert torch.equal(other.merge_map()[-1], model.merge_map()[-1])
    model.train()(reference.images(name))
    assert model.merge_map() == []


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_computes_the_same(name):
    expected = trained(reference.unlike(reference.build(name)), reference.images(name))
    model = reference.unlike(reference.build(name))
    model.set_grad_checkpointing()
    torch.testing.assert_close(trained(model, reference.images(name)), expected, rtol=0, atol=0)
    model = reference.unlike(reference.build(name))
    prepare_layers(model, "off", 2)
    torch.testing.assert_close(trained(model, reference.images(name)), expected, rtol=0, atol=0)


def test_checkpointing_saves_memory():
    """Bytes that autograd keeps."""
    kept = []
    for checkpointed in (False, True):
        model, saved = reference.build("ltm_vit_small"), []
        model.set_grad_checkpointing(checkpointed)

        def note(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(reference.images("ltm_vit_small"))
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")  # it does
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inductor uses it
@pytest.mark.parametrize(
    ("name", "every", "compiler"),
    [
        ("ltm_vit_small", 1, "aot_eager"),
        pytest.param("ltm_vit_small", 0, "inductor", marks=pytest.mark.soak),
        pytest.param("ltm_swin_tiny", 0, "inductor", marks=pytest.mark.soak),
        pytest.param("ltm_mobilevit_xs", 0, "aot_eager", marks=pytest.mark.soak),
        pytest.param("ltm_efficientvit_b1", 0, "aot_eager", marks=pytest.mark.soak),
    ],
)
def test_compiled_layers_have_no_graph_break(name, every, compiler):
    """inductor takes neither MobileViT's nor EfficientViT's stages one by one, of timm's own models neither."""
    torch._dynamo.reset()
    counters.clear()
    model, other = reference.unlike(reference.build(name)), reference.unlike(reference.build(name))
    prepare_layers(model, compiler, every)
    given = reference.images(name)
    torch.testing.assert_close(trained(model, given), trained(other, given), rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(given), other.eval()(given), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.merge_map(), other.merge_map())
    assert not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("ltm_vit_small", {"img_size": 32}),
        pytest.param("ltm_swin_tiny", {"img_size": 32}, marks=pytest.mark.soak),
        pytest.param("ltm_mobilevit_xs", {}, marks=pytest.mark.soak),
        pytest.param("ltm_efficientvit_b1", {}, marks=pytest.mark.soak),
    ],
)
def test_is_exported_to_torch_and_onnx(name, changed):
    check_exports(timm.create_model(name, num_classes=7, **SMALL[name] | changed), any_batch=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_trains_in_bfloat16(name):
    """The answers are near, but for tokens that are about as near to two anchors."""
    expected = trained(reference.build(name), reference.images(name))
    with torch.autocast("cpu", torch.bfloat16):
        found = trained(reference.build(name), reference.images(name))
    assert (found["answers"].float() - expected["answers"]).norm() < 0.1 * expected["answers"].norm()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())
    pure = reference.build(name).bfloat16()
    assert trained(pure, reference.images(name).bfloat16())["answers"].dtype == torch.bfloat16


def test_the_last_mask_of_a_vit_learns_where_the_head_reads_its_tokens():
    assert "blocks.2.mask.log_tau" not in dict(reference.build("ltm_vit_small").named_parameters())
    model = reference.build("ltm_vit_small", global_pool="avg")
    assert trained(model, reference.images("ltm_vit_small"))["blocks.2.mask.log_tau"].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_are_of_their_block_s_layer_and_do_not_decay(name):
    model = reference.build(name)
    scales, names = {}, {id(parameter): key for key, parameter in model.named_parameters()}
    for part in param_groups_layer_decay(model, layer_decay=0.5, weight_decay_exclude_1d=False):
        scales |= {names[id(parameter)]: part["lr_scale"] for parameter in part["params"]}
    undecayed = group(model, 1.0, "matrices").undecayed
    assert model.mask_names()
    for key in model.mask_names():
        block = key.rpartition(".mask.")[0]
        assert {scales[other] for other in scales if other.startswith(f"{block}.")} == {scales[key]}
        assert key in undecayed


@torch.no_grad()
def test_feature_maps():
    model = timm.create_model("ltm_efficientvit_b1", features_only=True, **SMALL["ltm_efficientvit_b1"]).eval()
    assert [tuple(found.shape[1:]) for found in model(reference.images("ltm_efficientvit_b1"))] == [
        (8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)
    ]  # fmt: skip
    vit = reference.build("ltm_vit_small")
    with pytest.raises(UserError, match=r"compression_ratio=0\.8: a ViT that merges its tokens has no feature maps"):
        vit.forward_intermediates(reference.images("ltm_vit_small"))
    whole = reference.build("ltm_vit_small", compression_ratio=1)
    assert whole.forward_intermediates(reference.images("ltm_vit_small"), intermediates_only=True)[0].shape[2:] == (
        4,
        4,
    )


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("nan"), "most"])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(UserError) as caught:
        timm.create_model("ltm_vit_small", compression_ratio=ratio)
    assert str(caught.value) == (
        f"compression_ratio={ratio}: it is the share of its tokens that a block keeps, above 0 and at most 1 (which "
        "merges none): correct it"
    )


@pytest.mark.parametrize(("name", "factor", "message"), [
    ("ltm_efficientvit_b1", 0.1, "width_factor=0.1 leaves 13 channels to the first blocks that attend, but a head of "
                                 "them has 16: enlarge it"),
    ("ltm_swin_tiny", 0, "width_factor=0: it multiplies the widths of the model, so that it is above 0: enlarge it"),
])  # fmt: skip
def test_widths_that_cannot_be_are_refused(name, factor, message):
    with pytest.raises(UserError) as caught:
        timm.create_model(name, width_factor=factor)
    assert str(caught.value) == message


# --- by the recipe


def recipe_of(name: str, size: int, **options: object) -> Recipe:
    return Recipe(augment=Augment(image_size=size), model=Model(name=name, **options))


@pytest.mark.parametrize(("name", "options"), [
    ("ltm_vit_small", {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}),
    ("ltm_swin_tiny", {"width_factor": 0.25}),
    ("ltm_mobilevit_xs", {"width_factor": 0.5}),
    ("ltm_mobilevit_s", {}),
    ("ltm_efficientvit_b1", {"width_factor": 0.25}),
])  # fmt: skip
@pytest.mark.parametrize("size", [32, 64])
@torch.no_grad()
def test_a_recipe_makes_it(name, options, size):
    model = make_model(recipe_of(name, size, compression_ratio=0.7, **options), 5).eval()
    assert model(torch.randn(1, 3, size, size)).shape == (1, 5)
    assert model.compression_ratio == 0.7
    assert model.merge_map()


def test_a_recipe_names_options_that_it_has_not():
    with pytest.raises(UserError, match=r"'ltm_swin_tiny' does not take the options \{'depth': 3\}"):
        make_model(recipe_of("ltm_swin_tiny", 32, depth=3), 5)
    with pytest.raises(UserError, match=r"'vit_tiny_patch16_224' does not take the options \{'compression_ratio'"):
        make_model(recipe_of("vit_tiny_patch16_224", 32, compression_ratio=0.8), 5)


@pytest.mark.parametrize("name", FAMILIES)
def test_starts_from_the_model_without_merging(name, tmp_path):
    base, model = reference.build(name, compression_ratio=1), reference.build(name)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    result = load_start(model, tmp_path / "base.safetensors", new_heads=True)
    head = next(key for key, module in model.named_modules() if module is model.get_classifier())
    assert set(result.made_new) == {*model.mask_names(), f"{head}.weight", f"{head}.bias"}
    with pytest.raises(UserError, match=r"is a checkpoint of another model: \d+ weights differ"):
        load_start(model, tmp_path / "base.safetensors", new_heads=False)
    part = {key: tensor for key, tensor in model.state_dict().items() if key != model.mask_names()[0]}
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="1 weights differ"):
        load_start(model, tmp_path / "part.safetensors", new_heads=True)
    with pytest.raises(RuntimeError, match=f"Missing key.*{model.mask_names()[0]}"):
        model.load_state_dict(part)


@torch.no_grad()
def test_images_of_another_size():
    model = timm.create_model("ltm_vit_small", **SMALL["ltm_vit_small"], dynamic_img_size=True).eval()
    assert model(torch.randn(1, 3, 40, 32)).shape == (1, 1000)
    assert [mask.shape[1] for mask in model.merge_map()] == [20, 16, 13]
