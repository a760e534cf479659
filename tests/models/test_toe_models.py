"""Token expansion inside a ViT, a DeiT and a ViTTM."""

import copy

import pytest
import timm
import torch
import variants
from torch import Tensor, nn
from torch._dynamo.utils import counters

from pipeline.backend.layers import prepare_layers
from pipeline.loss import heads_of
from pipeline.models.t2t_vit import T2TViT
from pipeline.models.toe import TokenExpansion, expand_tokens
from shards.errors import UserError

PREFIX = {"vit": 1, "no class token": 0, "distilled": 2, "vittm": 0, "t2t": 1}
STAGES = {"steps": (0, 10, 20), "keep_rates": (0.5, 0.75, 1.0), "initial_keep_rate": 0.25, "repetitions": 2}
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}


def plain(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "vittm":
        return variants.build({}, depth=3)
    if kind == "t2t":
        small = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, "token_dim": 16, "num_classes": 7}
        return T2TViT(**small).train()
    if kind == "distilled":
        return timm.create_model("deit_tiny_distilled_patch16_224", **SIZES)
    options = {"class_token": False, "global_pool": "avg"} if kind == "no class token" else {}
    return timm.create_model("vit_tiny_patch16_224", **SIZES, **options)


def expanded(kind: str, epoch: int = 0, **changed: object) -> nn.Module:
    expansion = TokenExpansion(**STAGES | changed, num_prefix_tokens=PREFIX[kind])
    expansion.set_epoch(epoch)
    return expand_tokens(plain(kind), expansion)


def images(kind: str) -> Tensor:
    side = 64 if kind == "t2t" else 32
    return variants.images(height=side, width=side)


def trained(model: nn.Module, kind: str) -> list[Tensor]:
    """Answers and gradients."""
    model.zero_grad()
    answers = heads_of(model(images(kind)))
    variants.loss(answers).backward()
    return [*answers, *(parameter.grad for parameter in model.parameters())]


def lengths(model: nn.Module, kind: str) -> list[int]:
    """Tokens that come out of every layer; of ViTTM those of process."""
    found = []

    def note(layer: nn.Module, given: object, made: Tensor | tuple[Tensor, Tensor]) -> None:
        found.append((made[1] if kind == "vittm" else made).shape[1])

    noted = [layer.register_forward_hook(note) for layer in (model.layers if kind == "vittm" else model.blocks)]
    model(images(kind))
    for each in noted:
        each.remove()
    return found


@pytest.mark.parametrize("kind", PREFIX)
def test_later_layers_see_fewer_tokens_and_every_weight_learns(kind):
    model = expanded(kind)
    whole, *rest = lengths(model, kind)
    assert set(rest) == {PREFIX[kind] + (whole - PREFIX[kind]) // 2}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in trained(model, kind))
    model.token_expansion.set_epoch(20)
    assert lengths(model, kind) == [whole] * len([0, *rest])


@pytest.mark.parametrize("kind", PREFIX)
def test_off_it_is_the_plain_model_to_the_bit(kind):
    model, other = expanded(kind), plain(kind)
    assert list(model.state_dict()) == list(other.state_dict())
    model.token_expansion.set_epoch(20)
    torch.testing.assert_close(trained(model, kind), trained(other, kind), rtol=0, atol=0)
    model.token_expansion.set_epoch(0)
    unlike = trained(model, kind)
    assert not torch.equal(unlike[0], trained(other, kind)[0])
    model.eval()
    other.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images(kind)), other(images(kind)), rtol=0, atol=0)


def test_the_first_layer_is_that_of_the_plain_model_and_memory_keeps_its_tokens():
    model, other = expanded("vittm"), plain("vittm")
    found, expected = (
        each.layers[0](*each.embed(images("vittm")), each.read_fusion, each.write_fusion) for each in (model, other)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    memory, process = model.forward_features(images("vittm"))
    assert memory.shape[1] == 64
    assert process.shape[1] == 8


def test_feature_maps_in_evaluation_are_the_plain_model_s():
    model, other = expanded("vit").eval(), plain("vit").eval()
    both = [each.forward_intermediates(images("vit"), intermediates_only=True) for each in (model, other)]
    torch.testing.assert_close(*both, rtol=0, atol=0)


def test_a_copy_follows_its_own_expansion():
    model = expanded("vit")
    other = copy.deepcopy(model)
    other.token_expansion.set_epoch(20)
    assert (lengths(model, "vit")[-1], lengths(other, "vit")[-1]) == (9, 17)
    other.eval()
    assert lengths(model, "vit")[-1] == 9


@pytest.mark.parametrize("kind", ["vit", "vittm"])
def test_recomputed_activations_are_of_the_same_tokens(kind):
    """By our layers, of which the second begins with expanded tokens, and by timm, which selects them twice."""
    expected = trained(expanded(kind), kind)
    for every in (1, 2):
        model = expanded(kind)
        prepare_layers(model, "off", every)
        torch.testing.assert_close(trained(model, kind), expected, rtol=0, atol=0)
    model = expanded(kind)
    model.set_grad_checkpointing()
    torch.testing.assert_close(trained(model, kind), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize(("kind", "every"), [("vit", 1), ("vittm", 0)])
def test_compiled_layers_have_no_graph_break_in_any_stage(kind, every):
    torch._dynamo.reset()
    counters.clear()
    model, other = expanded(kind), expanded(kind)
    prepare_layers(model, "aot_eager", every)
    with torch.no_grad():
        model.eval()(images(kind))
        model.train()
    for epoch in (0, 10, 20):
        for each in (model, other):
            each.token_expansion.set_epoch(epoch)
        torch.testing.assert_close(trained(model, kind), trained(other, kind), rtol=1e-5, atol=1e-6)
    for epoch in (0, 10, 20):
        model.token_expansion.set_epoch(epoch)
        graphs = counters["stats"]["unique_graphs"]
        trained(model, kind)
        assert counters["stats"]["unique_graphs"] == graphs  # none is made twice
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_the_whole_model_is_one_graph():
    model = expanded("vit")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images("vit")), model(images("vit")), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_autocast_leaves_the_stream_as_it_is():
    """bf16 would round tokens that pass through without being merged."""
    expansion = TokenExpansion(**STAGES)
    x = torch.randn(1, 17, 48)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, _ = expansion(x)
    alone = [token for token in tokens[0] if (x[0] == token).all(dim=1).any()]
    assert tokens.dtype == torch.float32
    assert len(alone) > 1


REFUSED = {
    "prefix": (lambda: expand_tokens(plain("distilled"), TokenExpansion(**STAGES)),
               "num_prefix_tokens=1 tokens alone, but a VisionTransformerDistilled has 2 of them"),
    "prefix of ViTTM": (lambda: expand_tokens(plain("vittm"), TokenExpansion(**STAGES)),
                        "num_prefix_tokens=1 tokens alone, but a ViTTM has 0 of them: give num_prefix_tokens=0"),
    "suffix": (lambda: expand_tokens(plain("vit"), TokenExpansion(**STAGES, num_suffix_tokens=3)),
               "num_suffix_tokens=3 tokens alone, but a VisionTransformer has 0"),
    "a network without tokens": (lambda: expand_tokens(timm.create_model("resnet18"), TokenExpansion(**STAGES)),
                                 "but the model is a ResNet"),
    "twice": (lambda: expand_tokens(expanded("vit"), TokenExpansion(**STAGES)), "has a token expansion already"),
    "one block": (lambda: expand_tokens(timm.create_model("vit_tiny_patch16_224", depth=1), TokenExpansion(**STAGES)),
                  "the model's depth is 1"),
    "LTM": (lambda: expand_tokens(timm.create_model("ltm_vit_small", **SIZES), TokenExpansion(**STAGES)),
            "token expansion and compression_ratio=0.8 both choose among tokens"),
    "too few tokens": (lambda: expanded("vittm", initial_keep_rate=0.01),
                       "initial_keep_rate 0.01 of 16 tokens is none"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    attempt, words = REFUSED[name]
    with pytest.raises(UserError) as caught:
        attempt()
    assert words in str(caught.value)


@pytest.mark.parametrize("options", [{"rw_head_type": "tl"}, {"rw_head_type": "dyna"}, {"fusion_type": "add_erase"}])
def test_refuses_a_vittm_whose_weights_count_tokens(options):
    (name, value), *_ = options.items()
    with pytest.raises(UserError, match=f"{name}='{value}' owns weights sized by it: take rw_head_type lin"):
        expand_tokens(variants.build(options), TokenExpansion(**STAGES, num_prefix_tokens=0))


@pytest.mark.parametrize(
    "options", [{"rw_head_type": kind} for kind in ("lin", "ca", "la", "lca")] + [{"fusion_type": "erase"}]
)
def test_takes_every_other_head_and_fusion(options):
    model = variants.build(options)
    expansion = TokenExpansion(**STAGES, num_prefix_tokens=0)
    assert lengths(expand_tokens(model, expansion), "vittm") == [16, 8]
