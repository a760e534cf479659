"""Token expansion, alone and with EfficientTrain's stages: on two ranks of every strategy a run that is killed in the
middle of a stage ends with the same bits, and the debug forms learn digits. With and without it DeiT-tiny is as good
within the noise of three seeds, in less time."""

import dataclasses
import json
import math
import shutil
import statistics
import time
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from strategies import ZERO, place
from test_toe_deit_recipe import small

from pipeline import backend
from pipeline.recipe import Model, Recipe, TokenExpansion
from pipeline.trainer import fit, leave
from recipes import toe_deit

STRATEGIES = ("ddp", "fsdp", *ZERO)
LATER = ("step-00000012", "step-00000014")
SEEDS, EPOCHS = 3, 24
POINT = 0.01


def recipe_of(data: Path, run_dir: Path, strategy: str, variant: str) -> Recipe:
    made = small(data, run_dir, variant)
    compiler = "off" if strategy in ZERO else "aot_eager"
    return dataclasses.replace(
        made, runtime=dataclasses.replace(made.runtime, activation_checkpointing=2, compile=compiler)
    )


def train_each(data: Path, root: Path, variant: str) -> None:
    torch.set_num_threads(1)
    world = backend.start("cpu")
    for strategy in STRATEGIES:
        whole, resumed = root / strategy / "whole", root / strategy / "resumed"
        assert fit(recipe_of(data, whole, strategy, variant), place(world, strategy, root / strategy)) == "done"
        if world.is_main:
            shutil.copytree(whole, resumed)
            for name in LATER:
                shutil.rmtree(resumed / "checkpoints" / name)
        world.barrier()
        assert fit(recipe_of(data, resumed, strategy, variant), place(world, strategy, root / strategy)) == "done"
    leave(0)


@pytest.mark.soak
@pytest.mark.parametrize("variant", toe_deit.VARIANTS)
def test_a_run_that_is_killed_within_a_stage_ends_with_the_same_weights(shards, tmp_path, variant):
    ended = ranks.run_function(train_each, (shards, tmp_path, variant), tmp_path / "logs", 2).wait()
    assert ended.codes == [0, 0], "\n".join(ended.outputs)
    for strategy in STRATEGIES:
        for name in ("model", "ema") if variant == "deit" else ("model",):
            whole, again = (
                load_file(tmp_path / strategy / run / f"weights/{name}.safetensors") for run in ("whole", "resumed")
            )
            torch.testing.assert_close(again, whole, rtol=0, atol=0)


@pytest.mark.soak
@pytest.mark.parametrize("variant", toe_deit.VARIANTS)
def test_the_debug_form_learns_digits(digits, start, tmp_path, variant):
    options = ["--debug", "--variant", variant, "--data.path", str(digits), "--run-dir", str(tmp_path / "run")]
    ended = start("recipes/toe_deit.py", options).wait()
    assert ended.codes == [0], ended.outputs
    top1 = ranks.metrics(tmp_path / "run")[-1]["head_top1"]
    print(f"\ntoe_deit, {variant}: {top1:.4f} of the digits")
    assert top1 >= 0.95


def deit_tiny(data: Path, run_dir: Path, seed: int, tokens: TokenExpansion) -> Recipe:
    """DeiT-tiny in its own width and depth, on digits of 32 px in 16 patches, with little augmentation: there are 1,198
    of them, and what makes others of them makes a model of this depth slow to learn."""
    made = toe_deit.make("deit_tiny_patch16_224", True)
    plain = {"mixup": False, "cutmix": False, "erasing": 0.0, "randaugment_ops": 0, "crop_scale": (0.9, 1.0)}
    return dataclasses.replace(
        made,
        run_dir=str(run_dir),
        seed=seed,
        ema_decay=0.0,
        data=dataclasses.replace(made.data, path=str(data), global_batch=16, workers=0),
        augment=dataclasses.replace(made.augment, **plain),
        model=Model(name="deit_tiny_patch16_224", patch_size=8),
        token_expansion=tokens,
        schedule=dataclasses.replace(
            made.schedule, length=f"{EPOCHS} epochs", warmup="1 epochs", lr=4e-4, cosine_per="step"
        ),
        evaluation=dataclasses.replace(made.evaluation, every="100%"),
        checkpoint=dataclasses.replace(made.checkpoint, every="100%"),
        runtime=dataclasses.replace(made.runtime, pictures=False),
    )


def train_one(recipe: Recipe) -> None:
    """Leaves the CPU seconds of all threads in its directory: on a shared machine they tell more than a clock."""
    torch.set_num_threads(1)
    world, began = backend.start("cpu"), time.process_time()
    assert fit(recipe, world) == "done"
    (Path(recipe.run_dir) / "cpu.json").write_text(json.dumps(time.process_time() - began))
    leave(0)


@pytest.mark.soak
def test_deit_tiny_is_as_good_within_noise_in_less_time(digits, tmp_path):
    """Of three seeds each, in turns: the means of top-1 are apart by no more than two standard deviations (pooled) or
    one point, and every pair's run with token expansion is the quicker one."""
    full = toe_deit.make("deit_tiny_patch16_224", False).token_expansion
    thirds = dataclasses.replace(full, steps=(0, EPOCHS // 3, 2 * EPOCHS // 3))
    kinds = {"with": thirds, "without": TokenExpansion()}
    top1, seconds = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}
    for seed in range(SEEDS):
        for kind in [*kinds][:: 1 if seed % 2 else -1]:
            run_dir = tmp_path / f"{kind}-{seed}"
            recipe = deit_tiny(digits, run_dir, seed, kinds[kind])
            ended = ranks.run_function(train_one, (recipe,), tmp_path / "logs", 1).wait()
            assert ended.codes == [0], ended.outputs
            top1[kind].append(ranks.metrics(run_dir)[-1]["head_top1"])
            seconds[kind].append(json.loads((run_dir / "cpu.json").read_text()))
            print(f"\nseed {seed}, {kind}: top-1 {top1[kind][-1]:.4f}, {seconds[kind][-1]:.1f} CPU s", flush=True)
    means = {kind: statistics.mean(top1[kind]) for kind in kinds}
    spread = math.sqrt(statistics.mean(statistics.variance(top1[kind]) for kind in kinds))
    for kind in kinds:
        print(f"{kind} token expansion: top-1 {means[kind]:.4f}, {sum(seconds[kind]):.1f} CPU s")
    faster = sum(seconds["without"]) / sum(seconds["with"])
    print(
        f"apart by {means['with'] - means['without']:+.4f}, pooled deviation {spread:.4f}; {faster:.3f} times as fast"
    )
    assert abs(means["with"] - means["without"]) <= max(2 * spread, POINT)
    assert all(map(float.__lt__, seconds["with"], seconds["without"]))
