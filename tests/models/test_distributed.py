"""Models on two ranks of DDP, FSDP2 and ZeRO have the losses of one; under DDP no parameter may lack a gradient."""

import json
from functools import partial
from pathlib import Path

import ltm_reference
import pytest
import ranks
import timm
import torch
from strategies import ZERO, place
from torch import nn
from variants import SMALL

from pipeline.backend import StepOptions, World, start, wrap
from pipeline.loss import SummedOverHeads
from pipeline.models.t2t_vit import T2TViT
from pipeline.models.toe import TokenExpansion, expand_tokens
from pipeline.models.vittm import ViTTM
from pipeline.optim import adamw
from pipeline.trainer import leave

STRATEGIES = ("ddp", "fsdp", *ZERO)
VITTM = {
    "default": {},
    "shared fusions": {
        "rw_head_type": "ca",
        "fusion_type": "add_erase",
        "process_embedder_type": "latent",
        "memory_blocks": "mlp",
        "init_values": 0.1,
    },
    "activation checkpointing": {
        "rw_head_type": "dyna",
        "fusion_type": "erase",
        "process_embedder_type": "downsample",
        "memory_blocks": "conv",
        "memory_encoder_depths": (1, 1),
        "memory_decoder_depths": (1, 1),
        "global_pool": "token",
    },
}
T2T_VIT = {"T2T transformer": {"tokens_type": "transformer"}, "T2T performer": {"tokens_type": "performer"}}
SMALL_T2T = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "token_dim": 16, "num_classes": 7}
EXPANDED = {"token expansion": "vit_tiny_patch16_224", "token expansion of DeiT": "deit_tiny_distilled_patch16_224"}
RESIZED = {"images of several sizes": (16, 32, 24)}  # by steps
SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
LTM = {"LTM of ViT": ("ltm_vit_small", {}), "LTM of MobileViT": ("ltm_mobilevit_xs", {"compression_ratio": 0.5})}
PAIRS = [
    *((name, strategy) for name in VITTM for strategy in STRATEGIES),
    *((name, strategy) for name in (*T2T_VIT, *EXPANDED, *RESIZED) for strategy in ("fsdp", "zero2")),
    *((name, strategy) for name in LTM for strategy in ("ddp", "fsdp", "zero2")),
]
STEPS, BATCH = 3, 4
TOLERANCE = 1e-5


def train_each(strategies: tuple[str, ...], file: Path) -> None:
    """Three steps of every model by every strategy, in this one launch: {"model, strategy": [[loss, norm], ...]}."""
    world = start("cpu")
    found = {}
    for strategy in strategies:
        placed = place(world, strategy, file.parent)
        names = dict.fromkeys(name for name, its in PAIRS if its == strategy or world.size == 1)
        found |= {f"{name}, {strategy}": train(placed, name) for name in names}
    if world.is_main:
        file.write_text(json.dumps(found))
    leave(0)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in VITTM:
        return ViTTM(**SMALL | VITTM[name])
    if name in EXPANDED:
        model = timm.create_model(EXPANDED[name], **SMALL_VIT)
        expansion = TokenExpansion((0,), (0.5,), 0.25, 2, num_prefix_tokens=model.num_prefix_tokens)
        return expand_tokens(model, expansion)
    if name in LTM:  # norms of batches are those of evaluation: a rank's are of its own samples
        return ltm_reference.build(LTM[name][0], **LTM[name][1])
    if name in RESIZED:
        return timm.create_model("deit_tiny_patch16_224", dynamic_img_size=True, **SMALL_VIT)
    model = T2TViT(**SMALL_T2T | T2T_VIT[name])
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):  # ranks draw their own
            layer.p = 0.0
    return model


def train(world: World, name: str) -> list[list[float]]:
    """Of each step the loss of the whole batch, and the gradient norm."""
    model = build(name)
    model.set_grad_checkpointing(name == "activation checkpointing")
    optimizer = partial(adamw, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)
    backend = wrap(world, model, optimizer, StepOptions(BATCH))
    backend.set_lr(1e-3)
    generator = torch.Generator().manual_seed(1)
    steps = []
    for side in RESIZED.get(name, (32,) * STEPS):
        images = torch.randn(BATCH, 3, side, side, generator=generator)[world.rank :: world.size]
        targets = torch.eye(7)[torch.arange(BATCH)[world.rank :: world.size]]
        stepped = backend.step(SummedOverHeads("ce"), [(images, targets)])
        steps.append([world.sum([stepped.loss.item()])[0] / world.size, stepped.grad_norm.item()])
    backend.close()
    return steps


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[float]]]:
    root = tmp_path_factory.mktemp("distributed")
    alone = ranks.run_function(train_each, (("ddp",), root / "one.json"), root / "logs", 1)
    pair = ranks.run_function(train_each, (STRATEGIES, root / "two.json"), root / "logs", 2)
    for ended in (alone.wait(), pair.wait()):
        assert set(ended.codes) == {0}, "\n".join(ended.outputs)
    one, two = (json.loads((root / f"{size}.json").read_text()) for size in ("one", "two"))
    return {f"one {name}": found for name, found in one.items()} | two


@pytest.mark.parametrize(("model", "strategy"), PAIRS)
def test_losses_and_norms_equal_those_of_one_process(steps, model, strategy):
    expected, found = steps[f"one {model}, ddp"], steps[f"{model}, {strategy}"]
    assert found == [pytest.approx(step, rel=TOLERANCE) for step in expected]
    assert found[-1][0] < found[0][0]
