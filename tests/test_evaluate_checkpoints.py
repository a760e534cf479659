"""Checkpoints on the way, evaluated as finished runs are; which are not."""

import json
import shutil

from test_evaluate_tool import error_of, evaluation_of, scores_of

from pipeline.checkpoint.whole import file_names, flushed_hash, seal
from pipeline.predict import load_checkpoint
from pipeline.predict.evaluation import Settings, evaluate, open_images
from pipeline.predict.find import load_variants
from shards.store import StoreOptions


def test_a_checkpoint_on_the_way_scores_as_the_run_did_then(finished, shards, alone):
    run = finished / "pretrain"
    for step in (4, 8):
        variants = load_variants(run / "checkpoints" / f"step-{step:08d}")
        asked = variants[""]
        images = open_images(str(shards), "", asked, StoreOptions())
        found = evaluate(variants, images, Settings.of(asked.recipe, 0), alone)
        assert found.values == evaluation_of(run, step)  # bit by bit
    assert evaluation_of(run, 4) != evaluation_of(run, 8)
    averaged = load_checkpoint(run / "checkpoints" / "step-00000004")
    assert (averaged.classes, averaged.name) == (
        tuple(f"c{label}" for label in range(5)),
        f"{run}/checkpoints/step-00000004 (averaged weights)",
    )
    single = scores_of(averaged, shards, alone).values
    assert single["memory_top1"] == evaluation_of(run, 4)["ema_memory_top1"]


def test_shards_of_two_ranks_are_evaluated_by_two_ranks(start, small, shards, tmp_path):
    options = ["--debug", *small, "--schedule.length", "2 steps", "--runtime.no-pictures", "--run-dir"]
    trained = start("recipes/pretrain_21k.py", [*options, str(tmp_path / "run")], 2, ACCELERATE_USE_FSDP="true").wait()
    assert trained.codes == [0, 0], trained.outputs
    command = [str(tmp_path / "run" / "checkpoints" / "step-00000002"), str(shards), "--json", "--workers", "0"]
    ended = start("tools/evaluate.py", command, 2).wait()
    assert ended.codes == [0, 0], ended.outputs
    expected = evaluation_of(tmp_path / "run", 2)
    assert json.loads(ended.outputs[0].splitlines()[-1]).items() >= expected.items()


def test_checkpoints_that_are_not_evaluated(finished, tmp_path):
    path = shutil.copytree(finished / "pretrain" / "checkpoints" / "step-00000004", tmp_path / "step-00000004")
    state = json.loads((path / "state.json").read_text())
    for changed, told in (
        (state | {"strategy": "zero2"}, f"{path} was saved by zero2, whose files are pickles, which may run code when"),
        (
            state | {"recipe": {name: value for name, value in state["recipe"].items() if name != "seed"}},
            f"{path}/state.json is of an older version, and lacks fields that recipes have now: use the version that "
            'wrote it, or a file of weights/; the defaults are "seed": 0',
        ),
    ):
        (path / "state.json").write_text(json.dumps(changed))
        for name in ("manifest.json", "COMMITTED"):
            (path / name).unlink()
        seal(path, {name: flushed_hash(path / name) for name in file_names(path)})
        assert error_of(load_variants, path).startswith(told)
    (path / "state.json").write_text(json.dumps(state))
    assert "is no checkpoint that is whole (state.json: its SHA-256" in error_of(load_variants, path)
