"""recipe.json: what a run was, so that it is continued as that, and its model built again."""

import json
from collections.abc import Mapping
from pathlib import Path

from pipeline.recipe import Recipe, flatten, unflatten
from pipeline.record.json_files import read_json
from shards.durable import replace_text
from shards.errors import UserError

RECIPE = "recipe.json"
MAY_CHANGE = (
    *("run_dir", "checkpoint.", "evaluation.batch"),
    *("data.path", "data.remote", "data.cache", "data.workers", "data.max_bad", "data.accumulation"),
    *("runtime.device", "runtime.processes", "runtime.max_skipped", "runtime.hang_timeout", "runtime.log_every"),
    *("dry_run", "profile", "wandb", "runtime.norms", "runtime.pictures", "runtime.peak_tflops"),
    *("runtime.fsdp_replicas", "runtime.compile", "runtime.activation_checkpointing"),
)
"""Fields that a resumed run may change: they decide how, not what, is computed (the index has its own fingerprint)."""


def keep_recipe(run_dir: Path, recipe: Recipe) -> None:
    """RUN/recipe.json: every field by its name on the command line."""
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(run_dir / RECIPE, json.dumps(flatten(recipe), indent=1) + "\n")


def read_recipe(run_dir: Path) -> Recipe:
    """What `keep_recipe` kept. Raises UserError where it is missing, or has other fields than recipes have now."""
    path = run_dir / RECIPE
    if not path.is_file():
        raise UserError(f"{path}: no such file; it says how the model of a run is built: give a run that kept it")
    return recipe_of(read_json(path, dict), path)


def recipe_of(
    leaves: Mapping[str, object], path: Path, mend: str = "add them with the values that the run had"
) -> Recipe:
    """The recipe whose `flatten` `path` holds. Raises UserError where it has other fields than recipes have now; mend:
    what to do where it lacks some."""
    fields = flatten(Recipe())
    lacking = {name: value for name, value in fields.items() if name not in leaves}
    if unknown := [name for name in leaves if name not in fields]:
        raise UserError(
            f"{path} has the fields {unknown}, which recipes do not have now: use the version that wrote it"
        )
    if lacking:
        raise UserError(
            f"{path} is of an older version, and lacks fields that recipes have now: {mend}; the defaults are "
            f"{json.dumps(lacking)[1:-1]}"
        )
    return unflatten(leaves, Recipe)


def decisive_fields(recipe: Recipe) -> dict[str, object]:
    """The flattened recipe without what may change."""
    return {name: value for name, value in flatten(recipe).items() if not name.startswith(MAY_CHANGE)}


def check_same_recipe(kept: dict[str, object], recipe: Recipe, where: object) -> None:
    """Raises UserError where `where`, made by the flattened recipe `kept`, is not what `recipe` would make."""
    changed = [
        f"{name}: {kept[name]!r} there, {value!r} now"
        if name in kept
        else f"{name}: {value!r} now, and not known to the version that made it: go on with that one"
        for name, value in decisive_fields(recipe).items()
        if kept.get(name) != value
    ]
    if changed:
        raise UserError(
            f"{where} was made by another recipe; to continue it with this one would mix both:\n"
            + "\n".join(f"  - {text}" for text in changed)
            + "\ngive those values to continue it, or another --run-dir to start anew"
        )
