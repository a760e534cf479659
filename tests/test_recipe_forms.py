"""Every recipe in all its variants: built at full size, and its debug form trained for two steps."""

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import ranks
import timm
import torch
from safetensors.torch import save_file

from pipeline.backend import start
from pipeline.durations import make_schedule
from pipeline.models.build import make_model
from pipeline.optim import group, make_optimizer
from pipeline.recipe import Recipe, flatten
from pipeline.record import read_metrics
from pipeline.telemetry.flops import FORWARDS_A_STEP, forward_flops
from pipeline.trainer import fit, leave
from pipeline.validate import validate
from recipes import finetune_1k, pretrain_21k

MODULES = {"pretrain": (pretrain_21k, 11_060_223, 10_450), "finetune": (finetune_1k, 1_281_167, 1000)}
STEPS = {"pretrain": 810_000, ("finetune", "small"): 93_600, ("finetune", "base"): 187_500}
SHAMPOO = {
    "name": "shampoo",
    "betas": [0.9, 0.999],
    "shampoo.epsilon": 1e-12,
    "shampoo.max_preconditioner_dim": 8192,
    "shampoo.precondition_frequency": 100,
    "shampoo.start_preconditioning_step": 300,
    "shampoo.grafting_beta2": 0.999,
    "shampoo.grafting_epsilon": 1e-8,
}
ALPHAS = ("augment.mixup_alpha", "augment.cutmix_alpha")
UNLIKE = ("run_dir", "model.name", *ALPHAS, "augment.randaugment_ops", "augment.randaugment_magnitude")
FORMS = {
    f"{stage}-{model}-{variant}"
    for stage, model, variant in itertools.product(
        MODULES, ("vittm_base", "deittm_base", "vit_base_patch16_224"), ("adamw", "shampoo")
    )
}
"""Of the debug forms those that are unlike one another: what `small_forms` comes to."""
ASSUMED = 8 * 312e12 * 0.4


def on_meta(recipe: Recipe, classes: int) -> torch.nn.Module:
    with torch.device("meta"):
        return make_model(recipe, classes)


@pytest.mark.parametrize("model", pretrain_21k.MODELS)
@pytest.mark.parametrize("stage", MODULES)
def test_every_variant_is_built_at_full_size(stage, model):
    module, images, classes = MODULES[stage]
    plain = module.make(model, False)
    network = on_meta(plain, classes)
    size = next(size for size in ("base", "small") if f"_{size}" in model)
    _, durations = make_schedule(plain, images // plain.data.global_batch)
    assert durations.total == STEPS.get((stage, size), STEPS.get(stage))
    assert module.VARIANTS == ("adamw", "shampoo", "authors", "authors-shampoo")
    run_dirs = set()
    for variant in module.VARIANTS:
        recipe = module.make(model, False, variant)
        validate(recipe)
        optimizer = make_optimizer(network, recipe.optimizer, group(network, recipe.optimizer.layer_decay))
        assert type(optimizer).__name__ == ("Shampoo" if variant.endswith("shampoo") else "AdamW")
        changed = {name: value for name, value in flatten(recipe).items() if value != flatten(plain)[name]}
        expected = {"optimizer.name": "shampoo"} if variant.endswith("shampoo") else {}
        expected |= {"model.init_from": "blocks"} if variant.startswith("authors") else {}
        run_dirs.add(changed.pop("run_dir", plain.run_dir))
        assert changed == expected
        if variant.endswith("shampoo"):
            assert flatten(recipe.optimizer).items() >= SHAMPOO.items()
    assert len(run_dirs) == 4, "a variant would go on in another one's directory"


@pytest.mark.parametrize("stage", MODULES)
def test_hours_are_the_arithmetic_that_the_docstring_names(stage):
    module, images, classes = MODULES[stage]
    text = " ".join(module.__doc__.split())
    told = re.search(
        r"base would take ([\d.]+) hours and small ([\d.]+), ViT-B and DeiT-B ([\d.]+), ViT-S and DeiT-S ([\d.]+)\.",
        text,
    )
    assert told, text
    models = ("vittm_base", "vittm_small", "vit_base_patch16_224", "deit_small_patch16_224")
    for model, hours in zip(models, told.groups(), strict=True):
        flops = FORWARDS_A_STEP * forward_flops(module.make(model, False), classes, batch=2)
        places = len(hours.partition(".")[2])
        assert float(hours) == pytest.approx(flops * 300 * images / ASSUMED / 3600, abs=0.6 * 10**-places)


def small_forms(data: Path, root: Path) -> dict[str, Recipe]:
    """The debug forms for two steps on `data`: one of those whose models are built alike, and whose other fields differ
    in how strong the augmentation is alone."""
    found, seen = {}, set()
    for stage, model, variant in itertools.product(MODULES, pretrain_21k.MODELS, pretrain_21k.VARIANTS):
        made, name = MODULES[stage][0].make(model, True, variant), f"{stage}-{model}-{variant}"
        recipe = dataclasses.replace(
            made,
            run_dir=str(root / name),
            data=dataclasses.replace(made.data, path=str(data), global_batch=16, workers=0),
            schedule=dataclasses.replace(made.schedule, length="2 steps"),
            evaluation=dataclasses.replace(made.evaluation, every="100%"),
            checkpoint=dataclasses.replace(made.checkpoint, every="100%"),
            runtime=dataclasses.replace(made.runtime, pictures=False),
        )
        same = {field: value for field, value in flatten(recipe).items() if field not in UNLIKE}
        network = on_meta(recipe, 5)
        shapes = [(weight, tensor.shape) for weight, tensor in network.state_dict().items()]
        key = str((sorted(same.items(), key=str), type(network), shapes))
        if key not in seen:
            found[name] = recipe
        seen.add(key)
    return found


def train_each(data: Path, root: Path) -> None:
    """And one from the blocks of a ViT of its size, as the authors' variants do at full size."""
    torch.set_num_threads(1)
    world, forms = start("cpu"), small_forms(data, root)
    trunk = timm.create_model("vit_base_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3, patch_size=8)
    save_file(trunk.state_dict(), root / "trunk.safetensors")
    plain = forms["pretrain-vittm_base-adamw"]
    section = dataclasses.replace(plain.model, init_from="blocks", init_weights=str(root / "trunk.safetensors"))
    forms["blocks"] = dataclasses.replace(plain, run_dir=str(root / "blocks"), model=section)
    for recipe in forms.values():
        assert fit(recipe, world) == "done"
    leave(0)


def test_every_debug_form_trains_two_steps(shards, tmp_path):
    ended = ranks.run_function(train_each, (shards, tmp_path), tmp_path / "logs", 1).wait()
    assert ended.codes == [0], ended.outputs
    trained = {path.parent.name: read_metrics(path.parent) for path in tmp_path.glob("*/metrics.jsonl")}
    assert set(trained) == {*FORMS, "blocks"}
    for name, lines in trained.items():
        assert [line["step"] for line in lines if "loss" in line] == [1, 2], name
        assert lines[-1]["step"] == 2
        assert "split" in lines[-1], name
    assert f"start weights blocks of {tmp_path / 'trunk.safetensors'}: 24 loaded" in ended.outputs[0]
    first, blocks = trained["pretrain-vittm_base-adamw"], trained["blocks"]
    assert first[0]["loss"] == pytest.approx(blocks[0]["loss"]), "heads are zero at first, so losses are equal"
    assert first[1]["loss"] != blocks[1]["loss"]
