"""timm's ViT and DeiT, trained by the same recipes as ViTTM."""

import pytest
import ranks
import timm
import torch
from safetensors.torch import load_file

from pipeline.models.build import make_model
from recipes import finetune_1k, pretrain_21k


@pytest.mark.parametrize("model", pretrain_21k.MODELS)
def test_models_of_the_recipes_are_built_at_full_size(model):
    with torch.device("meta"):
        built = make_model(finetune_1k.make(model, False), num_classes=1000)
        bare = timm.create_model(model, num_classes=1000)
    assert {name: tensor.shape for name, tensor in built.state_dict().items()} == {
        name: tensor.shape for name, tensor in bare.state_dict().items()
    }


def test_a_baseline_runs_through_the_chain(start, shards, tmp_path):
    """On both ranks of FSDP2: its layers are found under timm's name for them."""
    options = ["--debug", "--model", "deit_small_patch16_224", "--run-dir", str(tmp_path / "run")]
    for stage in ("pretrain", "finetune"):
        given = {"data.path": shards, "data.global-batch": 16, "data.workers": 0, "augment.image-size": 16,
                 "model.embed-dim": 24, "schedule.length": "4 steps"}  # fmt: skip
        options += [text for name, value in given.items() for text in (f"--{stage}.{name}", str(value))]
    ended = start("recipes/chain.py", options, 2, ACCELERATE_USE_FSDP="true").wait()
    assert ended.codes == [0, 0], "\n".join(ended.outputs)
    assert "deit_small_patch16_224: " in ended.outputs[0]
    assert "made new: head.weight, head.bias; dropped: head.bias, head.weight" in ended.outputs[0]
    for stage in ("pretrain", "finetune"):
        evaluation = ranks.metrics(tmp_path / "run" / stage)[-1]
        assert {"head_top1", "ema_head_top1", "head_top5"} <= evaluation.keys()
        weights = load_file(tmp_path / "run" / stage / "weights" / "ema.safetensors")
        assert weights["blocks.1.attn.qkv.weight"].shape == (72, 24)
