"""Each option of ViTTM learns, also in bf16 and with activation checkpointing; what no model can be is refused."""

import pytest
import timm
import torch
from variants import VARIANTS, build, images, loss, step

from pipeline.models.vittm import ViTTM
from shards.errors import UserError

# Softmax over tokens does not feel what is added to all of them: their gradient is zero but for rounding.
WITHOUT_EFFECT = {"ca": "k_norm.bias", "lca": "k_norm.bias", "la": "mlp.fc2.bias", "tl": "mlp.fc2.bias"}
BF16_TOLERANCE = 0.02


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_parameter_has_a_gradient_in_the_second_step(variant):
    torch.manual_seed(0)
    model = build(VARIANTS[variant])
    for head in model.get_classifier():
        torch.nn.init.zeros_(head.weight)  # as a fresh model has it
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        answers = model(images())
        losses.append(loss(answers))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[1] < losses[0]
    none = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert [name for name in none if not name.endswith(WITHOUT_EFFECT.get(variant, "-"))] == []


def test_activation_checkpointing_changes_nothing(variant):
    """With drop path, attention and projection dropout, whose masks must be drawn anew alike."""
    model = build(VARIANTS[variant], drop_path_rate=0.5, attn_drop_rate=0.1, proj_drop_rate=0.1)
    kept = step(model)
    model.set_grad_checkpointing()
    found = step(model)
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
    model.set_grad_checkpointing(False)
    assert not model.grad_checkpointing


def test_activation_checkpointing_keeps_less():
    """Bytes that a forward pass saves for the backward pass, parameters aside."""
    model = build({})
    whole = _saved_bytes(model)
    model.set_grad_checkpointing()
    assert _saved_bytes(model) < 0.2 * whole


def _saved_bytes(model: ViTTM) -> int:
    own, saved = {parameter.data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        answers = model(images())
    assert len(answers) == 2
    return sum(saved.values())


def test_bf16_autocast_stays_near_fp32(variant):
    model = build(VARIANTS[variant])
    exact = step(model)
    with torch.autocast("cpu", torch.bfloat16):
        rough = step(model)
    for name in ("memory", "process"):
        assert rough[name].dtype == torch.bfloat16
        difference = (rough[name] - exact[name]).norm() / exact[name].norm()
        assert 0 < difference < BF16_TOLERANCE
    assert all(rough[name].isfinite().all() for name in exact)


def _refused(error: str, **options) -> None:
    with pytest.raises(UserError) as raised:
        timm.create_model("vittm_tiny", **options)
    assert error in str(raised.value)


def test_options_that_exclude_each_other():
    _refused(
        "fusion_type='erase' with rw_head_type='dyna' and dyna_concat=False: the head does not look at the stream "
        "that it answers, and the fusion forgets it, so that weights before it would never be trained: take "
        "dyna_concat=True, or another fusion_type.",
        fusion_type="erase",
        rw_head_type="dyna",
        dyna_concat=False,
    )
    why = "patch dropout changes the number of process tokens in training, but these weights fit one number"
    _refused(f"patch_drop_rate=0.1 with rw_head_type='tl': {why}", patch_drop_rate=0.1, rw_head_type="tl")
    _refused(f"patch_drop_rate=0.1 with rw_head_type='dyna': {why}", patch_drop_rate=0.1, rw_head_type="dyna")
    _refused(f"patch_drop_rate=0.1 with fusion_type='add_erase': {why}", patch_drop_rate=0.1, fusion_type="add_erase")


def test_process_tokens():
    patch, downsample, latent = ({"process_embedder_type": kind} for kind in ("patch", "downsample", "latent"))
    _refused("process_tokens=4 has no meaning for process_embedder_type='patch'", process_tokens=4, **patch)
    _refused("process_tokens=0, but it is a number of things, at least 1", process_tokens=0, **latent)
    _refused("process_tokens=2.5, but it is a number of things", process_tokens=2.5, **downsample)
    _refused(
        "process_tokens=9: process_embedder_type='downsample' averages memory tokens to 9x9, but memory has only 8x8: "
        "take a smaller process_tokens, or a smaller memory_ps.",
        process_tokens=9,
        **downsample,
    )
    _refused(
        "process_embedder_type='downsample' makes a square of process tokens, but process_ps cuts 8x16 of this image: "
        "give the square's side as process_tokens.",
        img_size=(224, 448),
        **downsample,
    )
    model = build({"process_embedder_type": "downsample", "process_tokens": 6})
    model(images())
    with pytest.raises(UserError, match=r"process_tokens=6: .* to 6x6, but memory has only 4x4"):
        model(images(height=16, width=16))


def test_widths_that_do_not_divide():
    _refused(
        "dyna_num_heads=7 does not divide embed_dim=192: a dyna head takes an equal share of the width; set "
        "dyna_num_heads to 4 or 6 or 8, or change embed_dim.",
        rw_head_type="dyna",
        dyna_num_heads=7,
    )
    _refused("4 does not divide embed_dim=30: conv memory blocks", memory_blocks="conv", embed_dim=30, num_heads=3,
             latent_size_scale=1)  # fmt: skip
    _refused("dyna_num_heads=0, but it is a number of things", rw_head_type="dyna", dyna_num_heads=0)
    _refused("reduced_dim=0, but it is a number of things", rw_head_type="dyna", reduced_dim=0)
    _refused("int(embed_dim * memory_mlp_ratio)=0, but it is", memory_blocks="mlp", memory_mlp_ratio=0.001)


def test_memory_blocks():
    _refused("memory_blocks='lstm' is not available in ViTTM; it has None, '', 'mlp', 'conv'.", memory_blocks="lstm")
    _refused(
        "memory_encoder_depths=[3, 3], memory_encoder_downsamples=[2], memory_decoder_depths=[3, 3]: every stage of "
        "the encoder has a depth, a downsampling and a stage of the decoder that undoes it: give all three the same",
        memory_blocks="conv",
        memory_encoder_downsamples=(2,),
    )
    _refused("a downsampling is from 1: correct", memory_blocks="conv", memory_encoder_downsamples=(2, 0))
    _refused("depths are numbers of blocks, from 0", memory_blocks="conv", memory_decoder_depths=(-1, 1))
    assert list(ViTTM(depth=1, memory_blocks="").layers[0].memory_block.parameters()) == []
