"""T2T-ViT against its authors' program: every intermediate, and checkpoints under the names that go round."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.models.t2t_vit import T2TViT, remap_upstream_state_dict

GOLDEN = Path(__file__).parents[1] / "golden" / "t2t"
EXACT = {"rtol": 0, "atol": 1e-5}
NOT_OPTIONS = {"labels", "note", "shapes"}
TO_MMPRETRAIN = (
    (r"^blocks\.", "encoder."),
    (r"\bnorm([12])\.", r"ln\1."),
    (r"\bmlp\.fc1\.", "ffn.layers.0.0."),
    (r"\bmlp\.fc2\.", "ffn.layers.1."),
)


@pytest.fixture(scope="module", params=["transformer", "performer"])
def golden(request: pytest.FixtureRequest) -> tuple[dict, dict[str, Tensor]]:
    """What the reference file says of its model, and its tensors."""
    path = GOLDEN / f"t2t_{request.param}_48.safetensors"
    return json.loads(path.with_suffix(".json").read_text()), load_file(path)


def weights_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("sd."): tensor for name, tensor in tensors.items() if name.startswith("sd.")}


def build(described: dict) -> T2TViT:
    return T2TViT(**{name: value for name, value in described.items() if name not in NOT_OPTIONS}).eval()


@pytest.fixture
def model(golden: tuple[dict, dict[str, Tensor]]) -> T2TViT:
    described, tensors = golden
    model = build(described)
    model.load_state_dict(remap_upstream_state_dict(weights_of(tensors), model))
    return model


@torch.no_grad()
def test_every_intermediate(golden, model):
    _, expected = golden
    module, found = model.tokens_to_token, {}
    hooks = {"attn1": module.attention1, "attn2": module.attention2, "project": module.project}
    for name, part in hooks.items():
        part.register_forward_hook(lambda _, given, made, name=name: found.update({name: (given[0], made)}))
    found["tokens"] = module(expected["input"])
    features = model.forward_head(model.forward_features(expected["input"]), pre_logits=True)
    torch.testing.assert_close(found["attn1"], (expected["unfold0"], expected["attn1"]), **EXACT)
    torch.testing.assert_close(found["attn2"], (expected["unfold1"], expected["attn2"]), **EXACT)
    torch.testing.assert_close(found["project"], (expected["unfold2"], expected["tokens"]), **EXACT)
    torch.testing.assert_close(found["tokens"], expected["tokens"], **EXACT)
    torch.testing.assert_close(features, expected["features"], **EXACT)
    torch.testing.assert_close(model(expected["input"]), expected["logits"], **EXACT)


def test_loss_and_gradients(golden, model):
    described, expected = golden
    loss = F.cross_entropy(model(expected["input"]), torch.tensor(described["labels"]))
    torch.testing.assert_close(loss, expected["loss"][0], **EXACT)
    loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {name for name in expected if name.startswith("grad.")}
    assert len(gradients) == 2
    for name in gradients:
        torch.testing.assert_close(parameters[name.removeprefix("grad.")].grad, expected[name], rtol=1e-4, atol=1e-7)


def test_positions_are_the_authors_table(golden):
    described, expected = golden
    model = build(described)
    torch.testing.assert_close(model.pos_embed, expected["sd.pos_embed"], rtol=0, atol=0)
    assert "pos_embed" not in dict(model.named_parameters())


def _mmpretrain_name(name: str, head: str) -> str:
    if name.startswith("head."):
        return head + name.removeprefix("head.")
    for pattern, theirs in TO_MMPRETRAIN:
        name = re.sub(pattern, theirs, name)
    return f"backbone.{name}"


@pytest.mark.parametrize("head", ["head.", "head.fc.", "head.layers.head."])
def test_checkpoints_of_mmpretrain_and_wrapped_ones_load_alike(golden, model, head, tmp_path):
    described, expected = golden
    theirs = {_mmpretrain_name(name, head): tensor for name, tensor in weights_of(expected).items()}
    assert any(".ffn.layers.0.0." in name for name in theirs)
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in weights_of(expected).items()}
    for number, checkpoint in enumerate((theirs, wrapped)):
        torch.save(checkpoint, tmp_path / f"{number}.pth")
        read = torch.load(tmp_path / f"{number}.pth", weights_only=True)
        again = build(described)
        again.load_state_dict(remap_upstream_state_dict(read, again))
        torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_weights_that_the_model_has_not_are_left_for_the_strict_load_to_name(golden, model):
    _, expected = golden
    renamed = remap_upstream_state_dict(weights_of(expected) | {"backbone.neck.weight": torch.zeros(1)}, model)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*neck\.weight"):
        model.load_state_dict(renamed)
