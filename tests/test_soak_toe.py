"""Token expansion on two ranks of every strategy: killed in the middle of a stage, a run ends with the same bits."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from strategies import ZERO, place
from test_toe_deit_recipe import small

from pipeline.backend import start
from pipeline.recipe import Recipe
from pipeline.trainer import fit, leave

STRATEGIES = ("ddp", "fsdp", *ZERO)
LATER = ("step-00000012", "step-00000014")


def recipe_of(data: Path, run_dir: Path, strategy: str) -> Recipe:
    made = small(data, run_dir)
    compiler = "off" if strategy in ZERO else "aot_eager"
    return dataclasses.replace(
        made, runtime=dataclasses.replace(made.runtime, activation_checkpointing=2, compile=compiler)
    )


def train_each(data: Path, root: Path) -> None:
    torch.set_num_threads(1)
    world = start("cpu")
    for strategy in STRATEGIES:
        whole, resumed = root / strategy / "whole", root / strategy / "resumed"
        assert fit(recipe_of(data, whole, strategy), place(world, strategy, root / strategy)) == "done"
        if world.is_main:
            shutil.copytree(whole, resumed)
            for name in LATER:
                shutil.rmtree(resumed / "checkpoints" / name)
        world.barrier()
        assert fit(recipe_of(data, resumed, strategy), place(world, strategy, root / strategy)) == "done"
    leave(0)


@pytest.mark.soak
def test_a_run_that_is_killed_within_a_stage_ends_with_the_same_weights(shards, tmp_path):
    ended = ranks.run_function(train_each, (shards, tmp_path), tmp_path / "logs", 2).wait()
    assert ended.codes == [0, 0], "\n".join(ended.outputs)
    for strategy in STRATEGIES:
        for name in ("model", "ema"):
            whole, again = (
                load_file(tmp_path / strategy / run / f"weights/{name}.safetensors") for run in ("whole", "resumed")
            )
            torch.testing.assert_close(again, whole, rtol=0, atol=0)
