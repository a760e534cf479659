"""The optimizer's section of a recipe."""

import pytest

from pipeline.recipe import Optimizer, Recipe, Shampoo, flatten, parse, unflatten
from pipeline.record import check_same_recipe
from pipeline.validate import validate
from recipes import pretrain_21k
from shards.errors import UserError


def test_shampoos_defaults_are_the_authors_settings():
    fields = flatten(Recipe())
    assert {name: value for name, value in fields.items() if name.startswith("optimizer.shampoo.")} == {
        "optimizer.shampoo.epsilon": 1e-12,
        "optimizer.shampoo.max_preconditioner_dim": 8192,
        "optimizer.shampoo.precondition_frequency": 100,
        "optimizer.shampoo.start_preconditioning_step": 300,
        "optimizer.shampoo.grafting_beta2": 0.999,
        "optimizer.shampoo.grafting_epsilon": 1e-8,
    }
    assert (fields["optimizer.name"], fields["optimizer.betas"]) == ("adamw", [0.9, 0.999])


def test_its_fields_are_options_and_come_back_from_recipe_json():
    options = ["--optimizer.name", "shampoo", "--optimizer.shampoo.precondition-frequency", "7"]
    recipe = parse(pretrain_21k.make, pretrain_21k.MODELS, "", options)
    assert (recipe.optimizer.name, recipe.optimizer.shampoo.precondition_frequency) == ("shampoo", 7)
    assert unflatten(flatten(recipe), Recipe) == recipe
    with pytest.raises(UserError, match=r"optimizer\.shampoo\.precondition_frequency: 100 there, 7 now"):
        check_same_recipe(flatten(recipe) | {"optimizer.shampoo.precondition_frequency": 100}, recipe, "there")


def test_what_is_out_of_range():
    shampoo = Shampoo(0.0, max_preconditioner_dim=0, grafting_beta2=1.0, grafting_epsilon=-1.0)
    recipe = Recipe(optimizer=Optimizer(betas=(0.9, 1.0), eps=-1e-8, layer_decay=0.0, shampoo=shampoo))
    with pytest.raises(UserError) as error:
        validate(recipe)
    assert [line.strip(" -") for line in str(error.value).splitlines()[1:]] == [
        "optimizer.shampoo.max_preconditioner_dim 0: must be 1 or more",
        "optimizer.eps -1e-08: must be 0 or more",
        "optimizer.betas[1] 1.0: must be 0 <= value < 1",
        "optimizer.shampoo.grafting_beta2 1.0: must be 0 <= value < 1",
        "optimizer.shampoo.epsilon 0.0: must be above 0",
        "optimizer.shampoo.grafting_epsilon -1.0: must be above 0",
        "optimizer.layer_decay 0.0: must be 0 < value <= 1",
    ]
