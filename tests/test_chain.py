"""The chain as a user launches it: finished stages, stale ones, a signal; `make soak` kills it at many moments."""

import json
import shutil

import numpy as np
import psutil
import pytest
import ranks
import torch
import torch.nn.functional as F

from pipeline.augment.device import normalise
from pipeline.augment.exact import EvalTransform
from pipeline.predict import load_run
from pipeline.record import last_evaluation, weights_path
from shards.index import Index
from shards.reader import Reader
from tools import provenance

CHAIN = "recipes/chain.py"


def test_finished_stages_are_skipped_and_changed_ones_done_again_beside_them(
    start, chain_options, tmp_path, shards, capsys
):
    root, run = tmp_path / "run", [*chain_options, "--run-dir", str(tmp_path / "run")]
    first = start(CHAIN, run).wait()
    assert first.codes == [0], first.outputs
    assert (
        "made new: head.weight, head.bias, process_head.weight, process_head.bias; dropped: head." in first.outputs[0]
    )
    outcome = json.loads((root / "outcome.json").read_text())
    assert outcome == {"outcome": "done", "step": 4, "reason": "every stage is finished"}
    written = {path: path.stat().st_mtime_ns for path in root.glob("*/weights/*")}
    again = start(CHAIN, run).wait()
    assert again.codes == [0]
    assert again.outputs[0].count("finished before, skipped") == 4
    larger = [*run, "--finetune.augment.image-size", "32", "--hand-over", "best_model"]
    listed = start(CHAIN, [*larger, "--list"]).wait()
    assert listed.codes == [0]
    assert [line.split()[:2] for line in listed.outputs[0].splitlines()[::2]] == [
        ["skip", "pretrain"],
        ["run", "finetune"],
        ["run", "evaluate"],
        ["run", "export"],
    ]
    assert not (root / "finetune-2").exists()
    changed = start(CHAIN, larger).wait()
    assert changed.codes == [0], changed.outputs
    assert "its inputs changed: augment.image_size: 16 there, 32 now" in changed.outputs[0]
    assert "start weights " + str(root / "pretrain" / "weights" / "best_model.safetensors") in changed.outputs[0]
    assert "loaded; resized: memory_pos_embed, process_pos_embed; made new: head.weight" in changed.outputs[0]
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert f"the page about it: {root}/report.html" in changed.outputs[0]
    assert "finetune-2" in (root / "report.html").read_text()
    evaluated = json.loads((root / "evaluate-2" / "evaluation.json").read_text())
    recorded = last_evaluation(root / "finetune-2")
    figures = {f"ema_{name}": value for name, value in evaluated.items() if name.startswith(("memory", "process"))}
    assert len(figures) == 6
    assert figures == {name: recorded[name] for name in figures}
    kept = json.loads((root / "export-2" / "provenance.json").read_text())
    pretraining = kept["start"]["made_by"]["start"]["made_by"]
    assert kept["start"]["made_by"]["directory"] == str(root / "finetune-2")
    hashes = {shard.name: shard.sha256 for shard in Index.load(shards).split("train").shards}
    assert pretraining["splits"]["train"]["shards"] == hashes
    weights = root / "export-2" / "timm" / "model.safetensors"
    assert provenance_of(weights, capsys)[-1] == "everything that is still there is as it was noted"
    told = provenance_of(weights, capsys, "--shards")
    assert [line.split(":")[0] for line in told if not line.startswith(" ")] == ["export", "finetune", "pretrain"]
    assert all(f"    {name}: sha256 {value}" in told for name, value in hashes.items())
    others = shutil.copytree(shards, tmp_path / "others")
    manifest = json.loads((others / "index.json").read_text())
    manifest["classes"][0] = "renamed"
    (others / "index.json").write_text(json.dumps(manifest))
    stale = start(CHAIN, [text.replace(str(shards), str(others)) for text in [*larger, "--list"]]).wait()
    assert stale.outputs[0].count("run ") == 4
    assert stale.outputs[0].count("data of train: ") == 2


def test_a_chain_goes_on_where_it_was_moved_to(start, chain_options, tmp_path):
    options = [*chain_options, "--finetune.schedule.length", "40 steps", "--pretrain.schedule.length", "2 steps"]
    for stage in ("pretrain", "finetune"):
        options += [f"--{stage}.evaluation.every", "100%", f"--{stage}.checkpoint.every", "100%"]
        options += [f"--{stage}.runtime.no-pictures"]
    running = start(CHAIN, [*options, "--run-dir", str(tmp_path / "old")])
    ranks.when_logged(tmp_path / "old" / "finetune" / "metrics.jsonl", 3, running.processes[0].is_alive)
    running.processes[0].terminate()
    assert running.wait().codes == [75]
    (tmp_path / "old").rename(tmp_path / "new")
    ended = start(CHAIN, [*options, "--run-dir", str(tmp_path / "new")]).wait()
    assert ended.codes == [0], ended.outputs
    assert f"stage finetune: {tmp_path}/new/finetune: goes on" in ended.outputs[0]
    steps = [line["step"] for line in ranks.metrics(tmp_path / "new" / "finetune") if "split" not in line]
    assert steps == list(range(1, 41))


def provenance_of(path, capsys, *options):
    assert provenance.main([str(path), *(options or ("--check",))]) == 0
    return capsys.readouterr().out.splitlines()


@torch.no_grad()
def scores_of(run, data):
    """Mean loss and top-1 of the memory head on the held-out images."""
    reader, transform = Reader(Index.load(data), "val"), EvalTransform.of(run.recipe)
    pixels, labels = zip(*(reader.read(sample, transform) for sample in range(len(reader))), strict=True)
    logits, labels = run.model(normalise(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))), torch.tensor(labels)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(dim=1) == labels).double().mean().item()


def test_what_a_run_leaves_behind(start, small, shards, tmp_path):
    ended = start("recipes/pretrain_21k.py", ["--debug", *small, "--run-dir", str(tmp_path)]).wait()
    assert ended.codes == [0], ended.outputs
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps, evaluations = ([line for line in lines if ("split" in line) is kind] for kind in (False, True))
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["step"] for line in evaluations] == [4, 8]
    timed = {"images_per_second", "data_wait", "save_seconds"}
    assert set(steps[0]) == {"step", "epoch", "loss", "lr", "grad_norm"} | timed
    assert [line["save_seconds"] > 0 for line in steps] == [False, False, True, False, True, False, True, False]
    assert ended.outputs[0].count("checkpoint: training stood still for") == 4
    heads = [prefix + head for prefix in ("", "ema_") for head in ("memory", "process")]
    counts = {f"{head}_{count}" for head in heads for count in ("top1", "top5", "loss")}
    assert set(evaluations[0]) == {"step", "split", "unreadable", "best_step", "ema_best_step"} | counts
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["step"], outcome["images"]) == ("done", 8, 8 * 16)
    assert outcome["save_seconds"] > sum(line["save_seconds"] for line in steps)
    assert json.loads((tmp_path / "recipe.json").read_text())["model.embed_dim"] == 24
    for name, prefix in (("model", ""), ("ema", "ema_")):
        loss, top1 = scores_of(load_run(weights_path(tmp_path, name)), shards)
        assert loss == pytest.approx(evaluations[1][f"{prefix}memory_loss"], rel=1e-5)
        assert top1 == pytest.approx(evaluations[1][f"{prefix}memory_top1"])
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000006", "step-00000008"]
    assert "step 8/8  loss" in ended.outputs[0]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_signal_to_one_rank_ends_the_chain_in_order(start, chain_options, tmp_path):
    options = [*chain_options, "--pretrain.schedule.length", "40 steps", "--pretrain.evaluation.every", "100%"]
    options += ["--pretrain.data.workers", "1", "--run-dir", str(tmp_path / "run")]
    running = start(CHAIN, options, 2)
    ranks.when_logged(tmp_path / "run" / "pretrain" / "metrics.jsonl", 3, lambda: running.processes[1].is_alive())
    helpers = [child for rank in running.processes for child in psutil.Process(rank.pid).children(recursive=True)]
    assert len(helpers) >= 4, "a fork server and a worker a rank"
    running.processes[1].terminate()
    ended = running.wait()
    assert ended.codes == [75, 75], "\n".join(ended.outputs)
    assert not psutil.wait_procs(helpers, timeout=ranks.PATIENCE)[1], "they outlive their ranks"
    outcomes = [json.loads((tmp_path / "run" / name / "outcome.json").read_text()) for name in ("", "pretrain")]
    assert [outcome["outcome"] for outcome in outcomes] == ["requeue", "requeue"]
    stopped = outcomes[1]["step"]
    assert 3 <= stopped < 40
    again = start(CHAIN, options, 2).wait()
    assert again.codes == [0, 0], "\n".join(again.outputs)
    assert f"steps {stopped} to 40, 5 an epoch" in again.outputs[0]
    steps = [line["step"] for line in ranks.metrics(tmp_path / "run" / "pretrain") if "split" not in line]
    assert steps == list(range(1, 41))
