"""The step, the schedule, clipping and the average, against thirty steps of the authors' loop and their LR curve."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.augment.device import normalise, one_hot
from pipeline.backend import StepOptions, wrap
from pipeline.ema import EMA
from pipeline.loss import SummedOverHeads
from pipeline.models.vittm import ViTTM, remap_upstream_state_dict
from pipeline.optim import WarmupCosine, adamw

GOLDEN = Path(__file__).parent / "golden" / "vittm"
MODEL_OPTIONS = ("img_size", "num_classes", "embed_dim", "depth", "num_heads", "memory_ps", "process_ps")


@pytest.fixture(scope="module")
def described() -> dict:
    return json.loads((GOLDEN / "train_ce.json").read_text())


@pytest.fixture(scope="module")
def tensors() -> dict:
    return load_file(GOLDEN / "train_ce.safetensors")


def weights_of(tensors: dict, prefix: str, model: ViTTM) -> dict:
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return remap_upstream_state_dict(named, model)


def test_thirty_steps_of_the_authors_loop(described, tensors, alone):
    config = described["config"]
    model = ViTTM(latent_size_scale=config["latent_size_scale"], **{name: config[name] for name in MODEL_OPTIONS})
    model.load_state_dict(weights_of(tensors, "init.", model))
    backend = wrap(
        alone,
        model,
        lambda module: adamw(module, (0.9, 0.999), 1e-8, described["weight_decay"]),
        StepOptions(global_batch=8, clip_norm=described["clip_norm"]),
    )
    schedule = WarmupCosine(
        described["lr"], described["warmup_lr"], described["min_lr"], described["warmup_steps"], described["steps"]
    )
    ema, criterion = EMA(backend, described["ema_decay"]), SummedOverHeads("ce")
    for step, expected in enumerate(described["log"]):
        backend.set_lr(schedule(step))
        batch = normalise(tensors["images"][step]), one_hot(tensors["labels"][step].long(), config["num_classes"])
        stepped = backend.step(criterion, [batch])
        ema.update()
        assert schedule(step) == pytest.approx(expected["lr"], rel=1e-12)
        assert stepped.loss.item() == pytest.approx(expected["loss"], rel=1e-5)
        assert stepped.grad_norm.item() == pytest.approx(expected["grad_norm"], rel=1e-5)
    torch.testing.assert_close(dict(model.state_dict()), weights_of(tensors, "final.", model), rtol=1e-5, atol=1e-5)
    averages = {shard.name: shard.tensor for shard in ema.shards}
    expected = {name: tensor.flatten() for name, tensor in weights_of(tensors, "ema.", model).items()}
    torch.testing.assert_close(averages, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "cosine_warmup1"])
def test_learning_rate_curves(name):
    curve = json.loads((GOLDEN / "lr_curves.json").read_text())[name]
    total = curve["total_steps"]
    schedule = WarmupCosine(curve["lr"], curve["warmup_lr"], curve["min_lr"], curve["warmup_steps"], total)
    assert [schedule(step) for step in range(total)] == pytest.approx(curve["values"][:total], rel=1e-12, abs=0)
    assert [schedule(step) for step in range(total, total + 50)] == [curve["min_lr"]] * 50


def test_no_warmup_starts_at_the_full_learning_rate():
    assert WarmupCosine(0.1, 0.001, 0.0, warmup_steps=0, total_steps=10)(0) == 0.1
