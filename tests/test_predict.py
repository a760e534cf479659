"""pipeline/predict.py: the model of a finished run; and what is none. That it scores as in the run: test_chain.py."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from pipeline.models.build import make_model
from pipeline.predict import load_run
from pipeline.recipe import Augment, Model, Recipe
from pipeline.record import RECIPE, keep_recipe, weights_path
from shards.errors import UserError

RECIPE_OF_RUN = Recipe(
    augment=Augment(image_size=32),
    model=Model(name="vittm_tiny", memory_ps=8, process_ps=16, embed_dim=24, depth=1, num_heads=3, start="gone.file"),
)


@pytest.fixture
def run_dir(tmp_path):
    """A finished run with weights of 7 classes, whose average says which class it always answers."""
    keep_recipe(tmp_path, RECIPE_OF_RUN)
    weights_path(tmp_path, "model").parent.mkdir()
    weights = make_model(RECIPE_OF_RUN, 7).state_dict()
    save_file(weights, weights_path(tmp_path, "model"))
    save_file(weights | {"head.bias": torch.arange(7.0)}, weights_path(tmp_path, "ema"))
    return tmp_path


def error_of(path) -> str:
    with pytest.raises(UserError) as raised:
        load_run(path)
    return str(raised.value)


def edit_recipe(run_dir, edit) -> None:
    leaves = json.loads((run_dir / RECIPE).read_text())
    edit(leaves)
    (run_dir / RECIPE).write_text(json.dumps(leaves))


def test_a_run_or_one_file_of_its_weights(run_dir, monkeypatch):
    averaged = load_run(run_dir)
    assert (averaged.weights, averaged.recipe) == (weights_path(run_dir, "ema"), RECIPE_OF_RUN)
    assert not averaged.model.training
    images = torch.randn(2, 3, 32, 32)
    assert averaged.model(images).tolist() == 2 * [list(range(7))]
    monkeypatch.chdir(run_dir / "weights")
    raw = load_run(weights_path(run_dir, "model").relative_to(run_dir / "weights"))
    assert not raw.model(images).any()
    weights_path(run_dir, "ema").unlink()
    assert load_run(run_dir).weights == weights_path(run_dir, "model")


def test_models_of_timm(tmp_path):
    recipe = Recipe(augment=Augment(image_size=160), model=Model(name="test_vit"))
    keep_recipe(tmp_path, recipe)
    weights_path(tmp_path, "model").parent.mkdir()
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), weights_path(tmp_path, "model"))
    assert load_run(tmp_path).model(torch.zeros(1, 3, 160, 160)).shape == (1, 3)


def test_no_finished_run(run_dir):
    assert error_of(run_dir / "gone") == (
        f"{run_dir}/gone: no such file or directory; give a finished run, or its weights/model.safetensors"
    )
    for name in ("ema", "model"):
        weights_path(run_dir, name).unlink()
    assert error_of(run_dir) == (
        f"{run_dir} has no weights/model.safetensors, which a run leaves when it is finished: give a finished run's "
        "directory (of a chain, that of a stage)"
    )


def test_weights_that_do_not_fit(run_dir):
    path, weights = weights_path(run_dir, "ema"), make_model(RECIPE_OF_RUN, 7).state_dict()
    torch.save(weights, path)
    assert f"{path} is not a safetensors file (" in error_of(run_dir)
    save_file({name: weight for name, weight in weights.items() if "head.weight" not in name}, path)
    assert error_of(run_dir) == (
        f"{path} is a checkpoint of another model: it has no classifier head.weight or process_head.weight."
    )
    save_file(weights, path)
    edit_recipe(run_dir, lambda leaves: leaves.update({"model.depth": 2}))
    assert f"{path} is a checkpoint of another model: " in error_of(run_dir)


def test_recipes_that_do_not_fit(run_dir):
    path = run_dir / RECIPE
    edit_recipe(run_dir, lambda leaves: leaves.update({"model.wings": 2}))
    assert error_of(run_dir) == (
        f"{path} has the fields ['model.wings'], which recipes do not have now: use the version that wrote it"
    )
    edit_recipe(run_dir, lambda leaves: [leaves.pop(name) for name in ("model.wings", "seed", "model.depth")])
    assert error_of(run_dir) == (
        f"{path} is of an older version, and lacks fields that recipes have now: add them with the values that the run "
        'had; the defaults are "seed": 0, "model.depth": null'
    )
    path.write_text("{")
    assert f"{path} is not the JSON that a run writes (" in error_of(run_dir)
    path.unlink()
    assert error_of(run_dir) == (
        f"{path}: no such file; it says how the model of a run is built: give a run that kept it"
    )
