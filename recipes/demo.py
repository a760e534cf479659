"""The chain on data that needs no download, beside its control: does pretraining help, and by how much?

Command:  make demo   (it makes the data and starts this file with accelerate launch, on 2 CPU processes or the GPUs)
Data:     data/demo/formula: 96 classes of glyphs drawn from formulas. data/demo/digits: scikit-learn's 1,797 real
          handwritten digits, a third of them held out (split val); few0, few1, few2 are 10 others a class.
Stages:   pretrain on the glyphs; chain: fine-tune on the digits from there; scratch: the same from a fresh model;
          few*_chain and few*_scratch: both with 10 labelled digits a class, over 3 seeds. A control differs from its
          chain in its start weights alone.
Time:     a few minutes on 2 cores; the measured time is in benchmarks/demo.jsonl.
Top-1:    on the held-out digits, measured: benchmarks/demo.jsonl.
"""

import dataclasses
import sys
from dataclasses import dataclass

from pipeline import chain
from pipeline.optim.table import describe
from pipeline.recipe import Augment, Checkpoint, Data, Evaluation, Model, Optimizer, Recipe, Schedule, parse

MODEL = "vittm_tiny"
FEW_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Demo:
    pretrain: Recipe
    finetune: Recipe
    few: Recipe
    run_dir: str = "runs/demo"
    """Where the stages' run directories lie."""


def make(model: str, small: bool) -> Demo:
    """The demo's three recipes; `--debug` makes each a few steps short."""
    pretrain = Recipe(
        run_dir="pretrain",
        ema_decay=0.98,
        data=Data(path="data/demo/formula", global_batch=64, workers=1),
        augment=Augment(image_size=32, crop_scale=(0.6, 1.0), hflip=0.0),
        model=Model(name=model, memory_ps=4, process_ps=16, embed_dim=64, depth=4, num_heads=2),
        optimizer=Optimizer(weight_decay=0.05),
        schedule=_schedule(small, "12 epochs"),
        evaluation=Evaluation(every="100%"),
        checkpoint=Checkpoint(every="20%"),
    )
    finetune = dataclasses.replace(
        pretrain,
        run_dir="finetune",
        ema_decay=0.95,
        data=dataclasses.replace(pretrain.data, path="data/demo/digits"),
        schedule=_schedule(small, "30 epochs"),
    )
    few = dataclasses.replace(
        finetune,
        run_dir="few",
        data=dataclasses.replace(finetune.data, global_batch=32),
        schedule=_schedule(small, "130 epochs"),
    )
    return Demo(pretrain, finetune, few)


def stages(demo: Demo) -> list[chain.Stage]:
    """Pretraining, then every fine-tuning from it and, with nothing else changed, from scratch."""
    finetunings = {"": demo.finetune} | {f"few{seed}_": _few(demo.few, seed) for seed in FEW_SEEDS}
    found: list[chain.Stage] = [chain.Train("pretrain", demo.pretrain)]
    for prefix, recipe in finetunings.items():
        for name, start_from in ((f"{prefix}chain", "pretrain"), (f"{prefix}scratch", "")):
            found.append(chain.Train(name, dataclasses.replace(recipe, run_dir=name), start_from))
    return found


def _few(recipe: Recipe, seed: int) -> Recipe:
    return dataclasses.replace(recipe, seed=seed, data=dataclasses.replace(recipe.data, train=f"few{seed}"))


def _schedule(small: bool, length: str) -> Schedule:
    return Schedule(length="10 steps" if small else length, warmup="10%", lr=3e-3, warmup_lr=1e-6, min_lr=1e-6)


if __name__ == "__main__":
    options, rest = chain.take_options(sys.argv[1:])
    chosen = parse(make, (MODEL,), f"{__doc__}\n{chain.USAGE}\n{describe()}", rest)
    chain.run(stages(chosen), chosen.run_dir, chosen.pretrain.runtime, options)
