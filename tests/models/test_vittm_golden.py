"""ViTTM against the authors' program, and so is the reference that all other options are compared with."""

import pytest
import reference
import torch
import torch.nn.functional as F
import upstream

from pipeline.models.vittm import ViTTM, remap_upstream_state_dict

TOLERANCE = {"rtol": 0, "atol": 3e-6}
GRADIENT = {"rel": 1e-4, "abs": 1e-8}  # softmax makes some gradients 0, of which rounding leaves less than 1e-8


def test_features_and_logits(golden):
    model = golden.model().eval()
    with torch.no_grad():
        features = model.forward_features(golden.given["x"])
        pre_logits = model.forward_head(*features, pre_logits=True)
        logits = model.forward_head(*features)
    for kind, (memory, process) in {"features": features, "pre_logits": pre_logits, "logits": logits}.items():
        torch.testing.assert_close(memory, golden.expected[f"memory_{kind}"], **TOLERANCE)
        torch.testing.assert_close(process, golden.expected[f"process_{kind}"], **TOLERANCE)


def test_loss_and_gradients(golden):
    model = golden.model().train()
    loss = sum(F.cross_entropy(logits, golden.given["labels"]) for logits in model(golden.given["x"]))
    torch.testing.assert_close(loss, golden.expected["loss"], **TOLERANCE)
    loss.backward()
    unused = float("nan")
    theirs = {key: torch.tensor(unused if norm is None else norm) for key, norm in golden.grad_norms.items()}
    expected = {name: norm.item() for name, norm in remap_upstream_state_dict(theirs, model).items()}
    ours = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert ours == pytest.approx(expected, **GRADIENT, nan_ok=False)


def test_the_reference_is_the_authors_program(golden):
    state = {name: tensor.requires_grad_() for name, tensor in golden.weights.items()}
    features = reference.features(state, golden.options, golden.given["x"])
    given = (state, golden.options, *features)
    found = {"features": features, "pre_logits": reference.pre_logits(*given), "logits": reference.logits(*given)}
    for kind, streams in found.items():
        for stream, tensor in zip(("memory", "process"), streams, strict=True):
            torch.testing.assert_close(tensor, golden.expected[f"{stream}_{kind}"], **TOLERANCE)
    loss = reference.loss(*given, golden.given["labels"])
    torch.testing.assert_close(loss, golden.expected["loss"], **TOLERANCE)
    loss.backward()
    norms = {name: tensor.grad.norm().item() for name, tensor in state.items() if tensor.grad is not None}
    assert norms == pytest.approx(
        {name: norm for name, norm in golden.grad_norms.items() if norm is not None}, **GRADIENT
    )


def test_the_authors_weights_have_these_names_and_shapes(golden):
    assert upstream.shapes(golden.options) == {name: tuple(tensor.shape) for name, tensor in golden.weights.items()}


def test_wrapped_and_averaged_checkpoints_load_alike(golden):
    model = ViTTM(**golden.options)
    wrapped = {f"module._orig_mod.{key}": value for key, value in golden.weights.items()}
    wrapped["n_averaged"] = torch.tensor(3)
    ours = remap_upstream_state_dict(wrapped, model)
    assert ours.keys() == model.state_dict().keys()
    assert ours.keys() == remap_upstream_state_dict(golden.weights, model).keys()


def test_patch_embed_alone_is_the_memory_embedder(small):
    kernel = torch.zeros(24, 3, 4, 4)
    alone = remap_upstream_state_dict({"patch_embed.proj.weight": kernel}, small)
    assert alone == {"memory_embedder.proj.weight": kernel}
    beside = {"patch_embed.proj.weight": kernel, "memory_embedder.proj.bias": torch.zeros(24)}
    assert list(remap_upstream_state_dict(beside, small)) == ["memory_embedder.proj.bias"]


def test_weights_that_the_model_has_not_are_left_for_the_strict_load_to_name(small):
    ours = remap_upstream_state_dict(small.state_dict() | {"mem_blocks.0.norm.weight": torch.zeros(24)}, small)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layers\.0\.memory_block\.norm\.weight"):
        small.load_state_dict(ours)
