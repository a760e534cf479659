"""ViTTM-S or ViTTM-B from pretraining on ImageNet-21k-P to fine-tuning on ImageNet-1k, as one pipeline.

Command:  accelerate launch --config_file ds_configs/ddp_gpu8.yaml recipes/chain.py --model vittm_base
Stages:   pretrain (recipes/pretrain_21k.py), then finetune (recipes/finetune_1k.py) from its averaged weights with new
          heads, then evaluate (of the averaged weights, on finetune's validation data or --evaluate.data) and export
          (of the same, in timm's layout). When the command is run again, a finished stage is skipped, an interrupted
          one resumed.
Variants: --variant adamw, shampoo, authors, authors-shampoo: as recipes/pretrain_21k.py has them; fine-tuning is with
          the same optimizer, and from what was pretrained in all of them.
Data, hardware, time, top-1: as those two files say.
Options:  --STAGE.FIELD overrides a stage's field (--evaluate.data, --export.onnx); the runtime's device and
          processes are pretrain's for the whole launch.
Debug:    --debug runs both debug forms, on any machine, in two minutes.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline import chain
from pipeline.optim.table import describe
from pipeline.recipe import Recipe, parse
from recipes import finetune_1k, pretrain_21k

VARIANTS = pretrain_21k.VARIANTS
FINETUNED = {"adamw": "adamw", "shampoo": "shampoo", "authors": "adamw", "authors-shampoo": "shampoo"}
"""Fine-tuning starts from what was pretrained in every variant, as the authors mean it."""


@dataclass(frozen=True)
class Chain:
    pretrain: Recipe
    finetune: Recipe
    run_dir: str
    """Where the stages' run directories lie."""
    hand_over: Literal["average", "model", "ema", "best_model", "best_ema"] = "average"
    """Which of pretrain's weights finetune starts from; average: ema, or model where no average is kept."""
    evaluate: chain.Evaluating = field(default_factory=chain.Evaluating)
    export: chain.Exporting = field(default_factory=chain.Exporting)


def make(model: str, small: bool, variant: str = VARIANTS[0]) -> Chain:
    run_dir = f"runs/debug/chain/{model}" if small else f"runs/chain/{model}"
    pretrain = dataclasses.replace(pretrain_21k.make(model, small, variant), run_dir="pretrain")
    finetune = dataclasses.replace(finetune_1k.make(model, small, FINETUNED[variant]), run_dir="finetune")
    return Chain(pretrain, finetune, run_dir if variant == VARIANTS[0] else f"{run_dir}-{variant}")


def stages(of: Chain) -> list[chain.Stage]:
    return [
        chain.Train("pretrain", of.pretrain),
        chain.Train("finetune", of.finetune, start_from="pretrain", weights=of.hand_over.removeprefix("average")),
        chain.Evaluate("evaluate", start_from="finetune", options=_on(of.finetune, of.evaluate)),
        chain.Export("export", start_from="finetune", options=of.export),
    ]


def _on(recipe: Recipe, asked: chain.Evaluating) -> chain.Evaluating:
    """What is asked for; what is not, as the recipe has it: its validation data, and how data is read."""
    data = recipe.data
    own: dict[str, Any] = {"remote": data.remote, "cache": data.cache, "cache_size": data.cache_size}
    own |= {} if asked.data else {"data": data.path, "split": data.val}
    return dataclasses.replace(asked, **{name: getattr(asked, name) or value for name, value in own.items()})


if __name__ == "__main__":
    options, rest = chain.take_options(sys.argv[1:])
    chosen = parse(make, pretrain_21k.MODELS, f"{__doc__}\n{chain.USAGE}\n{describe()}", rest, VARIANTS)
    chain.run(stages(chosen), chosen.run_dir, chosen.pretrain.runtime, options)
