"""recipes/t2t_vit.py: its authors' settings, a debug run through training, resume, hand-over and every tool."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline import backend
from pipeline.durations import make_schedule
from pipeline.models.build import make_model
from pipeline.optim import group, make_optimizer
from pipeline.recipe import Recipe
from pipeline.telemetry.flops import FORWARDS_A_STEP, forward_flops
from pipeline.trainer import fit, leave
from pipeline.validate import validate
from recipes import t2t_vit
from tools import export, predict

IMAGES, ASSUMED = 1_281_167, 8 * 312e12 * 0.4
W = "tokens_to_token.attention1.w"


@pytest.mark.parametrize("name", t2t_vit.MODELS)
def test_is_built_at_full_size_with_the_authors_decay(name):
    recipe = t2t_vit.make(name, False)
    validate(recipe)
    with torch.device("meta"):
        model = make_model(recipe, 1000)
    optimizer = make_optimizer(
        model, recipe.optimizer, group(model, recipe.optimizer.layer_decay, recipe.optimizer.decay)
    )
    decays = {
        name: part["weight_decay"]
        for part in optimizer.param_groups
        for name, parameter in model.named_parameters()
        if any(parameter is member for member in part["params"])
    }
    strength = 0.065 if name.endswith(("_19", "_24")) else 0.05
    for parameter, decay in decays.items():
        bare = parameter == "cls_token" or parameter.endswith("bias") or "norm" in parameter
        assert decay == (0 if bare else strength), parameter
    assert len(decays) == len(list(model.parameters()))


def test_the_learning_rate_of_each_epoch():
    recipe = t2t_vit.make("t2t_vit_t_14", False)
    steps = IMAGES // recipe.data.global_batch
    schedule, durations = make_schedule(recipe, steps)
    assert durations.total == 310 * steps
    assert schedule(0) == pytest.approx(5e-10)
    assert schedule(5 * steps) == pytest.approx(2.5e-4, rel=1e-5)
    for epoch, lr in {10: 5e-4, 155: 2.55e-4, 299: 1.00144e-5, 300: 1e-6, 309: 1e-6}.items():
        for step in (epoch * steps, (epoch + 1) * steps - 1):
            assert schedule(step) == pytest.approx(lr, rel=1e-4), epoch


def test_hours_are_the_arithmetic_that_the_docstring_names():
    told = re.search(r"would take ([\d.]+), ([\d.]+) and ([\d.]+) hours", " ".join(t2t_vit.__doc__.split()))
    assert told, t2t_vit.__doc__
    for model, hours in zip(("t2t_vit_t_14", "t2t_vit_t_19", "t2t_vit_t_24"), told.groups(), strict=True):
        flops = FORWARDS_A_STEP * forward_flops(t2t_vit.make(model, False), 1000, batch=2)
        assert float(hours) == pytest.approx(flops * 310 * IMAGES / ASSUMED / 3600, abs=0.06)


def small(data: Path, run_dir: Path, name: str, **changed: object) -> Recipe:
    """The debug form for four steps on `data`."""
    made = t2t_vit.make(name, True)
    return dataclasses.replace(
        made,
        run_dir=str(run_dir),
        data=dataclasses.replace(made.data, path=str(data), global_batch=16, workers=0),
        schedule=dataclasses.replace(made.schedule, length="4 steps", warmup="1 steps", cooldown="1 steps"),
        checkpoint=dataclasses.replace(made.checkpoint, every="2 steps"),
        evaluation=dataclasses.replace(made.evaluation, every="100%"),
        runtime=dataclasses.replace(made.runtime, log_every="1 steps"),
        **changed,
    )


def train_each(data: Path, root: Path) -> None:
    """Both kinds of token layers; the performer once more from the first's weights, and that killed in its middle."""
    torch.set_num_threads(1)
    world = backend.start("cpu")
    assert fit(small(data, root / "transformer", "t2t_vit_t_14"), world) == "done"
    assert fit(small(data, root / "performer", "t2t_vit_14"), world) == "done"
    weights = str(root / "performer/weights/ema.safetensors")
    section = dataclasses.replace(t2t_vit.make("t2t_vit_14", True).model, start=weights)
    assert fit(small(data, root / "next", "t2t_vit_14", seed=1, model=section), world) == "done"
    shutil.copytree(root / "next", root / "resumed")
    shutil.rmtree(root / "resumed/checkpoints/step-00000004")
    assert fit(small(data, root / "resumed", "t2t_vit_14", seed=1, model=section), world) == "done"
    leave(0)


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("t2t")
    ended = ranks.run_function(train_each, (shards, root), root / "logs", 1).wait()
    assert ended.codes == [0], ended.outputs
    return root


def test_debug_forms_train_and_are_resumed(trained):
    for name in ("transformer", "performer", "next"):
        lines = ranks.metrics(trained / name)
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
        assert {"head_top1", "ema_head_top1"} <= lines[-1].keys()
    whole, resumed = (load_file(trained / name / "weights/model.safetensors") for name in ("next", "resumed"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_random_features_are_handed_over_and_resumed(trained):
    """They are drawn by the seed, and the second run's seed is another one."""
    first, second = (load_file(trained / name / "weights/ema.safetensors")[W] for name in ("performer", "next"))
    assert torch.equal(first, second)
    other = make_model(dataclasses.replace(t2t_vit.make("t2t_vit_14", True), seed=1), 5).state_dict()[W]
    assert not torch.equal(first, other)
    assert torch.equal(load_file(trained / "resumed/weights/ema.safetensors")[W], first)


@pytest.mark.parametrize(("kind", "model"), [("transformer", "t2t_vit_t_14"), ("performer", "t2t_vit_14")])
def test_tools_take_a_run(trained, kind, model, tmp_path, capsys):
    run, photo, features = trained / kind, tmp_path / "photo.png", tmp_path / "features.safetensors"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(photo)
    assert predict.main([str(run), str(photo), "--json"]) == 0
    assert {"pred_class", "pred_label", "pred_score"} <= json.loads(capsys.readouterr().out).keys()
    assert predict.main([str(run), str(photo), "--features", str(features)]) == 0
    assert load_file(features)["head"].shape == (1, 64)
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["architecture"], round(32 / config["pretrained_cfg"]["crop_pct"])) == (model, 35)


def test_its_evaluation_is_that_of_training(trained, shards, start):
    ended = start("tools/evaluate.py", [str(trained / "performer"), str(shards), "--json", "--workers", "0"], 1).wait()
    assert ended.codes == [0], ended.outputs
    found, told = json.loads(ended.outputs[0].splitlines()[-1]), ranks.metrics(trained / "performer")[-1]
    assert found["ema_head_top1"] == told["ema_head_top1"]
