"""tools/bench_step.py: what it appends, that both of its sides take the same steps, and what it refuses."""

import json
from functools import partial

import pytest
import ranks
import torch
from safetensors.torch import load_file

from pipeline.backend import start
from pipeline.data.batch import Batch
from pipeline.trainer import leave
from tools import bench_step
from tools.step_sides import Bare, Settings, Turns, make_batch, train_fed

TINY = ["--models", "test_vit", "--image-size", "32", "--batch", "4", "--threads", "1"]


def train_both(root, averaged: bool) -> None:
    """Seven steps of each side from the same weights; what is left of both goes to a file."""
    world = start("cpu")
    settings = Settings("test_vit", 32, 4, "fp32", "off", "cpu", averaged)
    options = bench_step._options([*TINY, "--turns", "2"])
    bench_step.Bench(world, options, root).make_data()
    turns = Turns(make_batch(settings, world.device), number=2, steps=2)
    recipe = settings.recipe(root / "data", root / "run", turns.total)
    bare, schedule = Bare(recipe, world.device), []

    def step(batch: Batch) -> None:
        lr = recipe.schedule.lr * (1 + torch.cos(torch.tensor(torch.pi * len(schedule) / turns.total)).item()) / 2
        bare.optimizer.param_groups[0]["lr"] = lr
        schedule.append(lr)
        bare.step(batch)

    train_fed(recipe, world, partial(turns.feed, step))
    step(turns.batch)  # ours, too, has taken one that is in no turn
    weights = bare.averages.module.state_dict() if averaged else bare.model.state_dict()
    torch.save({"weights": weights, "steps": len(schedule), "turns": (turns.ours, turns.theirs)}, root / "theirs.pt")
    leave(0)


@pytest.mark.parametrize("averaged", [False, True])
def test_both_sides_take_the_same_steps(tmp_path, averaged):
    ended = ranks.run_function(train_both, (tmp_path, averaged), tmp_path / "logs", 1).wait()
    assert ended.codes == [0], ended.outputs
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=True)
    ours = load_file(tmp_path / "run" / "weights" / f"{'ema' if averaged else 'model'}.safetensors")
    assert theirs["steps"] == 7
    assert [len(seconds) for seconds in theirs["turns"]] == [2, 2]
    torch.testing.assert_close(ours, theirs["weights"], rtol=1e-4, atol=1e-6)


@pytest.mark.soak
def test_it_appends_a_line(tmp_path):
    output = tmp_path / "figures.jsonl"
    arguments = [*TINY, "--turns", "2", "--peak-tflops", "0.1", "--output", str(output)]
    ended = ranks.run_function(bench_step.main, (arguments,), tmp_path / "logs", 1).wait()
    assert ended.codes == [0], ended.outputs
    (record,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert {"benchmark", "date", "commit", "hardware", "command", "load", "device", "repetitions", "batch"} < {*record}
    found = record["summary"]["test_vit"]
    for kind in ("plain", "ema"):
        figures = found[kind]
        milliseconds, low_high, peaks = figures["ms"], figures["quartiles"], figures["peak_bytes"]
        assert figures["ratio"] == pytest.approx(milliseconds["ours"] / milliseconds["bare"], rel=0.01)
        assert 0 < low_high[0] <= low_high[1]
        assert figures["images_per_second"] == pytest.approx(4000 / milliseconds["ours"], rel=0.01)
        assert figures["memory_ratio"] == pytest.approx(peaks["ours"] / peaks["bare"], rel=0.01)
        computed = 3 * found["forward_gflops"] * figures["images_per_second"]
        assert figures["mfu"] == pytest.approx(computed / 100, rel=0.2, abs=1e-4)
        assert f"test_vit, {kind}" in ended.outputs[0]


@pytest.mark.soak
def test_stages_of_token_expansion_are_compared_with_all_tokens(tmp_path):
    output = tmp_path / "figures.jsonl"
    arguments = ["--models", "deit_tiny_patch16_224", "--batch", "4", "--threads", "2", "--turns", "3"]
    arguments += ["--keep-rates", "0.5", "1", "--output", str(output)]
    ended = ranks.run_function(bench_step.main, (arguments,), tmp_path / "logs", 1).wait()
    assert ended.codes == [0], ended.outputs
    found = json.loads(output.read_text())["summary"]["deit_tiny_patch16_224"]
    print(ended.outputs[0])
    assert found["keep 0.5"]["ratio"] < 0.75 < found["keep 1"]["ratio"] < 1.25
    assert found["faster"] == pytest.approx(2 / (found["keep 0.5"]["ratio"] + found["keep 1"]["ratio"]), rel=1e-3)
    assert found["keep 0.5"]["memory_ratio"] < found["keep 1"]["memory_ratio"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep-rates", "0.2"], "--keep-rates [0.2]: each must be above 0.25, which is what it begins with"),
        (["--turns", "0"], "turns and steps are [16, 1, 0, 1]: each must be at least 1"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda, but torch finds no CUDA device here: leave --device out",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_refusals(options, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        bench_step.main(["--threads", "1", *options])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
