"""How ViTTM starts, learns, drops, answers and refuses."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

from pipeline.models.vittm import ViTTM
from pipeline.models.vittm.fusion import Residual
from pipeline.models.vittm.heads import LinearHead
from shards.errors import UserError


def _images(batch: int = 2, side: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def _loss(model: ViTTM) -> torch.Tensor:
    return sum(F.cross_entropy(logits, torch.tensor([0, 1])) for logits in model(_images()))


def _step(model: ViTTM) -> torch.Tensor:
    loss = _loss(model)
    model.zero_grad(set_to_none=True)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return loss


def test_first_loss_is_of_a_uniform_guess_and_first_step_moves_only_the_heads(small_options, small):
    before = {name: parameter.detach().clone() for name, parameter in small.named_parameters()}
    loss = _step(small)
    assert loss.item() == pytest.approx(2 * math.log(small_options["num_classes"]), abs=1e-6)
    moved = {name for name, parameter in small.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"head.weight", "head.bias", "process_head.weight", "process_head.bias"}


@pytest.mark.parametrize("options", [{}, {"global_pool": "token"}, {"init_values": 1e-2}])
def test_every_parameter_has_a_gradient_in_the_second_step(small_options, options):
    torch.manual_seed(0)
    model = ViTTM(**small_options, **options)
    _step(model)
    _step(model)
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


def test_initialisation(small_options, small):
    model = ViTTM(**small_options | {"embed_dim": 96})
    attention = model.layers[0].block.attn.qkv
    assert attention.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.memory_pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    kernel = model.process_embedder.proj.weight
    xavier = math.sqrt(6 / (kernel[0].numel() + kernel[:, 0].numel()))
    assert 0.98 * xavier < kernel.abs().max().item() <= xavier
    zero = (
        attention.bias,
        model.process_embedder.proj.bias,
        *model.head.parameters(),
        *model.process_head.parameters(),
    )
    assert not any(parameter.any() for parameter in zero)
    assert list(small.buffers()) == []


def _give_heads_weights(model: ViTTM) -> None:
    for head in model.get_classifier():
        torch.nn.init.normal_(head.weight)


def test_eval_head_chooses_the_answer(small):
    _give_heads_weights(small)
    memory, process = small(_images())
    small.eval()
    torch.testing.assert_close(small(_images()), memory)
    for eval_head, expected in {"process": process, "mean": (memory + process) / 2, "both": (memory, process)}.items():
        small.eval_head = eval_head
        torch.testing.assert_close(small(_images()), expected)
    small.eval_head = "procces"
    with pytest.raises(UserError, match="eval_head='procces' is not available in ViTTM; it has 'memory', 'process'"):
        small(_images())


def test_reset_classifier(small):
    small.reset_classifier(5)
    assert [logits.shape for logits in small(_images())] == [(2, 5), (2, 5)]
    assert not small(_images())[0].any()
    small.reset_classifier(0)
    assert small.num_classes == 0
    assert [features.shape for features in small(_images())] == [(2, 24), (2, 24)]


@pytest.mark.parametrize(
    "option", ["drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"]
)
def test_dropping_acts_in_training_only_and_follows_the_seed(small_options, option):
    model = ViTTM(**small_options, **{option: 0.5})
    _give_heads_weights(model)
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers.append(torch.stack(model(_images())))
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])
    model.eval()
    assert torch.equal(model(_images()), model(_images()))


def test_drop_path_grows_with_depth_and_patch_dropout_leaves_memory_whole(small_options):
    model = ViTTM(**small_options | {"depth": 3}, drop_path_rate=0.2, patch_drop_rate=0.5)
    assert [getattr(layer.block.drop_path1, "drop_prob", 0) for layer in model.layers] == [0, 0.1, 0.2]
    memory, process = model.embed(_images())
    assert (memory.shape, process.shape) == ((2, 64, 24), (2, 8, 24))


def test_bf16_autocast_stays_near_fp32(small):
    _give_heads_weights(small)
    exact = torch.stack(small(_images()))
    with torch.autocast("cpu", torch.bfloat16):
        rough = torch.stack(small(_images()))
    assert (rough - exact).abs().max() < 0.02 * exact.abs().max()


def test_lin_head_keeps_small_features_in_bf16():
    torch.manual_seed(0)
    head = LinearHead(dim=32, num_heads=2, latent_size_scale=2)
    torch.nn.init.constant_(head.k.bias, -8.0)  # phi = exp(-8), which elu + 1 rounds to zero in bf16
    source, query = torch.randn(2, 500, 32), torch.randn(2, 9, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = head(source, query)
    exact = head.double()(source.double(), query.double())
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


def _layer_results(layer: torch.nn.Module, weights: torch.nn.Module) -> list[torch.Tensor]:
    """The two streams that `layer` gives, and the gradients of `weights`."""
    generator = torch.Generator().manual_seed(2)
    tokens = (torch.randn(2, 64, 24, generator=generator), torch.randn(2, 16, 24, generator=generator))
    streams = layer(*tokens, Residual(), Residual())
    sum(stream.square().sum() for stream in streams).backward()
    gradients = [parameter.grad for parameter in weights.parameters()]
    weights.zero_grad(set_to_none=True)
    return [*streams, *gradients]


def test_layer_compiles_without_graph_break(small):
    layer = small.layers[0]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(_layer_results(compiled, layer), _layer_results(layer, layer))


def _refused(error: str, **options) -> None:
    with pytest.raises(UserError) as raised:
        timm.create_model("vittm_tiny", **options)
    assert error in str(raised.value)


def test_refusals_name_the_value_the_reason_and_the_remedy():
    _refused("ViTTM has no option 'process_embedded_type'", process_embedded_type="patch")
    _refused("did you mean 'process_embedder_type'?", process_embedded_type="patch")
    _refused("it has attn_drop_rate, depth,", qqq=1)
    _refused(
        "rw_head_type='tp' is not available in ViTTM; it has 'lin', 'ca', 'la', 'lca', 'tl', 'dyna'.", rw_head_type="tp"
    )
    _refused("fusion_type='add' is not available in ViTTM; it has 'residual', 'erase', 'add_erase'.", fusion_type="add")
    _refused("process_embedder_type='linear' is not available in ViTTM; it has", process_embedder_type="linear")
    _refused("global_pool='max' is not available in ViTTM; it has 'avg', 'token'.", global_pool="max")
    _refused("memory_ps=28 and process_ps=28 must both divide 225; the nearest that works is 224 or 252.", img_size=225)
    _refused("the nearest that works is 224 or 336.", img_size=280, memory_ps=16)
    _refused("memory_ps=0, process_ps=28: a patch has at least 1 pixel a side", memory_ps=0)
    _refused("depth=0, but it is a number of things, at least 1", depth=0)
    _refused("pos_drop_rate=1.5, but it is the share that is dropped, from 0 to below 1", pos_drop_rate=1.5)
    _refused("num_heads=5 does not divide embed_dim=192: a head takes an equal share", num_heads=5)
    _refused("set num_heads to 3 or 4 or 6, or change embed_dim.", num_heads=5)
    _refused("num_heads=3 does not divide embed_dim // latent_size_scale=38", latent_size_scale=5)
    _refused("num_heads=3 does not divide embed_dim // latent_size_scale=2", latent_size_scale=96)
    _refused("embed_dim // latent_size_scale=0, but it is a number of things, at least 1", latent_size_scale=193)


def test_an_image_that_the_patches_do_not_divide_is_refused(small):
    with pytest.raises(UserError, match=r"image size 36x36 cannot be cut .* nearest that works is 32 or 40"):
        small(_images(side=36))


def test_timm_finds_the_models_and_their_preprocessing():
    sizes = ("tiny", "small", "base", "large")
    assert set(timm.list_models("*ittm_*")) == {f"{family}_{size}" for family in ("vittm", "deittm") for size in sizes}
    model = timm.create_model("vittm_tiny", num_classes=3, drop_path_rate=None)
    assert (model.num_classes, model.num_features, model.pretrained_cfg["crop_pct"]) == (3, 192, 0.875)
    with pytest.raises(RuntimeError, match="No pretrained weights exist for vittm_tiny"):
        timm.create_model("vittm_tiny", pretrained=True)
