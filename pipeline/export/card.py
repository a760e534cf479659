"""The model card: what the model is, how it is used, what it was made of, and under which licences."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.augment.exact import EvalTransform
from pipeline.export.source import UNKNOWN, Source, newest_state
from pipeline.recipe import Recipe, flatten
from pipeline.record import RECIPE, read_recipe, run_of

NAMES = {
    "model": "weights",
    "ema": "averaged weights",
    "best_model": "best weights",
    "best_ema": "best averaged weights",
}


@dataclass(frozen=True)
class Licences:
    """In the words of whoever exports, who alone can know them."""

    weights: str = UNKNOWN
    data: str = UNKNOWN
    start: str = UNKNOWN


def card(source: Source, config: dict, num_parameters: int, licences: Licences) -> str:
    """README.md, with the header that Hugging Face's hub reads. config: timm's config.json."""
    name, recipe = config["architecture"], source.recipe
    side, shorter = recipe.augment.image_size, EvalTransform.of(recipe).resized
    after = f" after {source.step} steps" if source.step is not None else ""
    start = licences.start if recipe.model.start else "there are none: it was trained from scratch"
    lineage = "\n".join(f"- {fact}" for fact in _lineage(source))
    return f"""---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
license: {licences.weights if re.fullmatch("[a-z0-9.-]+", licences.weights) else "other"}
---
# {name} of {source.run_dir.name}

{name}, {num_parameters / 1e6:.2f} M parameters, for images of {side} x {side} px and {config["num_classes"]} classes:
the {NAMES[source.variant]} of a training run{after}.

{_evaluation(source)}

## Use

```python
import json, timm
import pipeline.models  # of vittm-pipeline: adds its models to timm's

config = json.load(open("config.json"))
model = timm.create_model(config["architecture"], checkpoint_path="model.safetensors", **config["model_args"]).eval()
```

Images: the shorter side resized to {shorter} px (bicubic), the centre of {side} x {side} px cut out, scaled to 0 .. 1,
normalised by `mean` and `std` of config.json.

## Licences

| | |
|---|---|
| these weights | {licences.weights} |
| the data they were trained on | {licences.data} |
| the weights they started from | {start} |

"unknown" means that whoever exported the weights did not say; it is no permission.

## Lineage

{lineage}

## Recipe

```json
{json.dumps(flatten(recipe), indent=1)}
```
"""


def _evaluation(source: Source) -> str:
    """What the run itself measured of these weights."""
    average = source.variant.endswith("ema")
    lines = [line for line in source.evaluations if line["step"] == source.step]
    scores = {
        name: value
        for name, value in (lines[-1] if lines else {}).items()
        if name.endswith(("_top1", "_top5")) and name.startswith("ema_") == average
    }
    if not scores:
        return "The run recorded no evaluation of these weights."
    told = ", ".join(f"{name.removeprefix('ema_')} {value:.4f}" for name, value in scores.items())
    return f"Measured by the run on split `{lines[-1]['split']}` of `{source.recipe.data.path}`: {told}."


def _lineage(source: Source) -> Iterator[str]:
    """Facts, from these weights to those that everything began with."""
    yield f"These weights: `{source.path}`"
    recipe: Recipe | None = source.recipe
    run_dir, state = source.run_dir.absolute(), source.state
    told: list[Path] = []  # a run may be given its own weights to start anew from
    while recipe is not None and run_dir not in told:
        told.append(run_dir)
        yield _run_facts(run_dir, recipe, state)
        if not recipe.model.start:
            yield "It started from scratch."
            return
        start = Path(recipe.model.start)
        yield f"It started from `{start}`, SHA-256 {_sha256(start)}"
        run_dir = run_of(start)
        recipe = read_recipe(run_dir) if (run_dir / RECIPE).is_file() else None
        state = newest_state(run_dir)
    yield "The run that made those is told above." if recipe else "The run that made those is not known here."


def _run_facts(run_dir: Path, recipe: Recipe, state: dict) -> str:
    trained = f"{recipe.schedule.length} on split `{recipe.data.train}` of `{recipe.data.path}`"
    fingerprint = state.get("data", {}).get("fingerprint", UNKNOWN)
    where = f"{state['world']} ranks of {state['strategy']}" if state else f"{UNKNOWN} ranks"
    commit = state.get("commit", UNKNOWN)
    return f"Run `{run_dir.name}`: {trained}, index fingerprint {fingerprint}; commit {commit}; {where}"


def _sha256(path: Path) -> str:
    if not path.is_file():
        return f"{UNKNOWN}: the file is not here any more"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
