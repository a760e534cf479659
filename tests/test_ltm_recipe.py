"""recipes/ltm.py: its authors' settings, and debug runs through training, resume, fine-tuning from a base and tools."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import ranks
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from strategies import place
from torch import nn

from pipeline import backend
from pipeline.durations import make_schedule
from pipeline.models.build import make_model
from pipeline.models.ltm.sizes import BASES
from pipeline.optim import group
from pipeline.prepare import prepare
from pipeline.recipe import Bottleneck, Recipe
from pipeline.telemetry.flops import FORWARDS_A_STEP, forward_flops
from pipeline.trainer import fit, leave, train
from pipeline.validate import validate
from recipes import ltm
from tools import export, predict, show_merging

IMAGES, ASSUMED = 1_281_167, 4 * 312e12 * 0.4
NORMED = "ltm_mobilevit_xs"
QUICK = ("ltm_mobilevit_s", "ltm_vit_small")  # to count; the others in the soak


@pytest.mark.parametrize("name", ltm.MODELS)
def test_is_built_at_full_size_and_small(name):
    for small in (False, True):
        recipe = ltm.make(name, small)
        validate(recipe)
        with torch.device("meta"):
            model = make_model(recipe, 1000)
        assert (recipe.model.name, model.compression_ratio) == (name, 0.8)
        groups = group(model, 1.0, recipe.optimizer.decay).bind(model, split_hidden=False)
        decayed = {id(each) for part in groups if part.get("weight_decay", 1) for each in part["params"]}
        for parameter, tensor in model.named_parameters():
            bare = tensor.ndim < 2 or any(
                each in parameter for each in ("cls_token", "pos_embed", "relative_position_bias_table")
            )
            assert (id(tensor) in decayed) == (not bare), parameter
    assert {name for name in ltm.MODELS} == {*BASES}


def test_the_bottleneck_begins_after_90_epochs(shards):
    recipe = ltm.make("ltm_vit_small", False)
    schedule, durations = make_schedule(recipe, 5004)
    assert durations.total == 300 * 5004
    for epoch, lr in {0: 2e-4, 4: 2e-4, 5: 2e-4, 299: 2.0005e-5}.items():
        assert schedule(epoch * 5004) == pytest.approx(lr, rel=1e-3), epoch
    assert recipe.bottleneck == Bottleneck(weight=0.1, after="30%", centroids=1000, iterations=60)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.soak) for name in ltm.MODELS]
)
def test_hours_are_the_arithmetic_that_the_docstring_names(name):
    told = re.search("they would take .* Top-1", " ".join(ltm.__doc__.split()))
    assert told, ltm.__doc__
    hours = {name: float(value) for value, name in re.findall(r"([\d.]+)(?: hours)? \((\w+)\)", told[0])}
    assert {f"ltm_{name}" for name in hours} == {*ltm.MODELS}
    flops = FORWARDS_A_STEP * forward_flops(ltm.make(name, False), 1000, batch=2)
    assert hours[name.removeprefix("ltm_")] == pytest.approx(flops * 300 * IMAGES / ASSUMED / 3600, abs=0.06)


def small(data: Path, run_dir: Path, name: str, **changed: object) -> Recipe:
    """The debug form for four steps on `data`, the bottleneck from the first on."""
    made = ltm.make(name, True)
    given = {
        "run_dir": str(run_dir),
        "data": dataclasses.replace(made.data, path=str(data), global_batch=16, workers=0),
        "augment": dataclasses.replace(made.augment, image_size=32),
        "bottleneck": Bottleneck(weight=0.1, after="0%", centroids=6, iterations=3, samples=30),
        "schedule": dataclasses.replace(made.schedule, length="4 steps", warmup="1 steps"),
        "checkpoint": dataclasses.replace(made.checkpoint, every="2 steps"),
        "evaluation": dataclasses.replace(made.evaluation, every="100%", batch=12),
        "runtime": dataclasses.replace(made.runtime, log_every="1 steps"),
    }
    return dataclasses.replace(made, **given | changed)


def train_each(data: Path, root: Path) -> None:
    """A ViT and a MobileViT; the ViT without merging first, so that the other starts from it, and is killed."""
    torch.set_num_threads(1)
    world = backend.start("cpu")
    whole = small(data, root / "base", "ltm_vit_small", bottleneck=Bottleneck())
    assert fit(dataclasses.replace(whole, model=dataclasses.replace(whole.model, compression_ratio=1.0)), world)
    section = dataclasses.replace(whole.model, start=str(root / "base/weights/model.safetensors"))
    for name in ("vit", "resumed"):
        assert fit(small(data, root / name, "ltm_vit_small", model=section), world) == "done"
        if name == "vit":
            shutil.copytree(root / "vit", root / "resumed")
            shutil.rmtree(root / "resumed/checkpoints/step-00000004")
    assert fit(small(data, root / "mobilevit", NORMED), world) == "done"
    leave(0)


def train_normed(data: Path, root: Path) -> None:
    """Batch norms on two ranks: rank 0's statistics are everybody's; a step that is not finite leaves none behind."""
    world = backend.start("cpu")
    for strategy in ("ddp", "fsdp", "zero2"):
        recipe = small(data, root / strategy, NORMED, bottleneck=Bottleneck())
        shorter = dataclasses.replace(recipe.schedule, length="2 steps")
        run = prepare(dataclasses.replace(recipe, schedule=shorter), place(world, strategy, root / "configs"))
        before = norms(run.learner.backend.module)
        images = torch.full((8, 3, 32, 32), float("nan"))
        stepped = run.learner.backend.step(run.learner.criterion, [(images, torch.full((8, 5), 0.2))])
        assert not stepped.applied
        assert torch.equal(norms(run.learner.backend.module), before)
        assert train(run) == "done"
        mine = norms(run.learner.backend.module)
        assert not torch.equal(mine, before)
        averages = {shard.name: shard.tensor for shard in run.learner.pieces()["ema"] if "running" in shard.name}
        assert len(averages) == 2 * sum(
            isinstance(each, nn.BatchNorm2d) for each in run.learner.backend.module.modules()
        )
        both = world.gather((mine.tolist(), torch.cat([*averages.values()]).tolist()))
        assert both[0] == both[1], strategy
        assert mine.tolist() != torch.cat([*averages.values()]).tolist()
        run.learner.backend.close()
    leave(0)


def norms(model: nn.Module) -> torch.Tensor:
    """A copy of all running statistics."""
    named = model.named_buffers()
    return torch.cat([buffer.flatten().clone() for name, buffer in named if "running" in name])


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ltm")
    ended = ranks.run_function(train_each, (shards, root), root / "logs", 1).wait()
    assert ended.codes == [0], ended.outputs
    assert "start weights" in ended.outputs[0]
    return root


def test_debug_forms_train_and_are_resumed(trained):
    for name in ("base", "vit", "mobilevit"):
        lines = ranks.metrics(trained / name)
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
        assert {"head_top1", "ema_head_top1"} <= lines[-1].keys()
    whole, resumed = (load_file(trained / name / "weights/model.safetensors") for name in ("vit", "resumed"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_merging_starts_from_the_weights_of_its_base(trained):
    base, merging = (load_file(trained / name / "weights/model.safetensors") for name in ("base", "vit"))
    new = merging.keys() - base.keys()
    assert new
    assert all(".mask." in name for name in new), new
    assert base.keys() <= merging.keys()
    timm.create_model(
        "vit_small_patch16_224", img_size=32, num_classes=5, **ltm.NARROW["ltm_vit_small"]
    ).load_state_dict(base)


def test_statistics_of_batch_norms_on_two_ranks(shards, tmp_path):
    ended = ranks.run_function(train_normed, (shards, tmp_path), tmp_path / "logs", 2).wait()
    assert ended.codes == [0, 0], ended.outputs


@pytest.mark.parametrize(("run", "model", "width"), [("vit", "ltm_vit_small", 64), ("mobilevit", NORMED, 192)])
def test_tools_take_a_run(trained, run, model, width, tmp_path, capsys):
    photo, features = tmp_path / "photo.png", tmp_path / "features.safetensors"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(photo)
    assert predict.main([str(trained / run), str(photo), "--json"]) == 0
    assert {"pred_class", "pred_label", "pred_score"} <= json.loads(capsys.readouterr().out).keys()
    assert predict.main([str(trained / run), str(photo), "--features", str(features)]) == 0
    assert load_file(features)["head"].shape == (1, width)
    assert show_merging.main([str(trained / run), str(photo), "-o", str(tmp_path / "merged.png")]) == 0
    assert export.main([str(trained / run), str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architecture"] == model


def test_its_evaluation_is_that_of_training(trained, shards, start):
    ended = start("tools/evaluate.py", [str(trained / "mobilevit"), str(shards), "--json", "--workers", "0"], 1).wait()
    assert ended.codes == [0], ended.outputs
    found, told = json.loads(ended.outputs[0].splitlines()[-1]), ranks.metrics(trained / "mobilevit")[-1]
    assert (found["head_top1"], found["ema_head_top1"]) == (told["head_top1"], told["ema_head_top1"])
