"""What a user can get wrong: exit code 2, one message with value, limit, reason and remedy, and outcome.json."""

import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import ranks
from safetensors.torch import save_file

from pipeline.backend import World
from pipeline.models.build import make_model
from pipeline.prepare import prepare
from pipeline.recipe import parse
from pipeline.trainer import launch, save
from recipes import finetune_1k

FINETUNE = "recipes/finetune_1k.py"
JSON = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds_configs/nosuch.json"}


@pytest.fixture
def refused(start, small, tmp_path):
    """refused(options, size=1, **environment) -> the message of a launch whose ranks all exit with code 2."""

    def run(options: list[str], size: int = 1, **environment: str) -> str:
        everything = ["--debug", *small, "--run-dir", str(tmp_path / "run"), *options]
        ended = start(FINETUNE, everything, size, **environment).wait()
        assert ended.codes == [2] * size, "\n".join(ended.outputs)
        message = ended.outputs[0].partition("error: ")[2].strip()
        outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
        assert (outcome["outcome"], outcome["reason"]) == ("error", message)
        assert not (tmp_path / "run" / "metrics.jsonl").exists(), "work began before the error"
        return " ".join(message.split())

    return run


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--data.path", "nosuch"], ["nosuch", "tools/make_shards.py"]),
        (["--data.train", "trian"], ["trian", "train"]),
        (["--augment.image-size", "20"], ["20", "process_ps=8", "16 or 24"]),
        (["--model.name", "vittm_bse"], ["'vittm_bse'", "'vittm_base'"]),
        (["--model.embed-dim", "25"], ["25"]),
        (["--model.start", "nosuch.safetensors"], ["nosuch.safetensors"]),
        (["--runtime.device", "cuda"], ["runtime.device is 'cuda'", "no CUDA device", "--runtime.device cpu"]),
        (["--runtime.processes", "4"], ["asks for 4 ranks", "started 1", "--cpu"]),
        (["--runtime.fsdp-replicas", "2"], ["fsdp_replicas 2", "the launch file asks for ddp", "fsdp_*.yaml"]),
        (["--schedule.warmup", "9 steps"], ["'9 steps' is 9 steps", "'8 steps' is only 8", "warm up less"]),
        (["--schedule.length", "8 weeks"], ["schedule.length", "'8 weeks' is no duration", "'300 epochs'"]),
        (["--data.global-batch", "160"], ["160", "80"]),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_refused_before_work_starts(refused, options, parts):
    message = refused(options)
    assert all(part in message for part in parts), message


def test_a_global_batch_that_the_world_does_not_divide_under_zero(refused):
    assert refused(["--data.global-batch", "20"], size=3, **JSON) == (
        "a global batch of 20 does not cut evenly into 3 ranks x 1 micro-batches of pairs (mixing is on): DeepSpeed "
        "takes micro-batches of one size (ZeRO), so it must be a multiple of 6. Run on 2 or 5 ranks, or set the global "
        "batch to 18 or 24, or begin the run under DDP or FSDP2 (ds_configs/ddp_*.yaml, fsdp_*.yaml), whose ranks may "
        "take unequal shares."
    )


def test_a_global_batch_with_nothing_for_some_ranks(refused):
    message = refused(["--data.global-batch", "4", "--data.accumulation", "2"], size=2)
    assert "a global batch of 4 does not cut evenly into 2 ranks x 2 micro-batches" in message
    assert "set the global batch to 8 or more, or run on 1 ranks at most, or take 1 micro-batches at most." in message


def test_replicas_that_do_not_divide_the_ranks(refused):
    message = refused(["--runtime.fsdp-replicas", "3"], size=2, ACCELERATE_USE_FSDP="true")
    assert "fsdp_replicas 3 does not divide the 2 ranks" in message
    assert "give one of [1, 2]" in message


def test_a_checkpoint_of_another_model(refused, small, tmp_path):
    other = parse(finetune_1k.make, finetune_1k.MODELS, "", ["--debug", *small, "--model.depth", "3"])
    save_file(make_model(other, num_classes=5).state_dict(), tmp_path / "other.safetensors")
    message = refused(["--model.start", str(tmp_path / "other.safetensors")])
    assert "other.safetensors" in message
    assert "layers.2." in message


def test_a_deepspeed_configuration_that_is_not_there(refused):
    message = refused([], size=2, **JSON)
    assert "names the DeepSpeed configuration 'ds_configs/nosuch.json'" in message
    assert "correct deepspeed_config_file" in message


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"gradient_clipping": 3.0}, "gradient_clipping is 3.0, but the recipe makes it 1.0"),
        ({"bf16": {"enabled": True}}, "bf16 is given, but the recipe makes the precision fp32: the recipe owns it"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0, but this backend runs (1, 2, 3)"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            'zero_optimization.offload_param.device is "nvme", where averages and checkpoints cannot reach',
        ),
        ({"aio": {"block_size": "auto"}}, 'aio.block_size is "auto", but no recipe field fills it'),
    ],
)
def test_a_deepspeed_configuration_that_contradicts(refused, tmp_path, changes, part):
    config = {"zero_optimization": {"stage": 2}} | changes
    (tmp_path / "zero.json").write_text(json.dumps(config))
    environment = JSON | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero.json")}
    assert part in refused([], size=2, **environment)


def test_a_run_directory_that_cannot_be_written(start, small):
    """/sys takes no directory, not even from root."""
    ended = start(FINETUNE, ["--debug", *small, "--run-dir", "/sys/run"], 2).wait()
    assert ended.codes == [2, 2], "\n".join(ended.outputs)
    assert "error: run_dir /sys/run cannot be written (" in ended.outputs[0]
    assert "mend its permissions, make room, or give another --run-dir" in ended.outputs[0]
    assert "error: /sys/run takes no outcome.json" in ended.outputs[0]


def test_what_zero_3_cannot_compile(refused, tmp_path):
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    environment = JSON | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero.json")}
    message = refused(["--runtime.compile", "aot_eager"], size=2, **environment)
    assert "runtime.compile aot_eager cannot be had under ZeRO stage 3" in message
    assert "fsdp_*.yaml" in message


def test_resuming_with_another_recipe_shows_both_values(start, small, tmp_path):
    options = ["--debug", *small, "--run-dir", str(tmp_path / "run")]
    first = start(FINETUNE, [*options, "--schedule.length", "2 steps"]).wait()
    assert first.codes == [0], first.outputs
    changes = ["--schedule.length", "4 steps", "--data.workers", "2", "--data.global-batch", "8"]
    again = start(FINETUNE, [*options, *changes]).wait()
    assert again.codes == [2]
    assert "step-00000002 was made by another recipe; to continue it with this one would mix both" in again.outputs[0]
    assert "schedule.length: '2 steps' there, '4 steps' now" in again.outputs[0]
    assert "data.global_batch: 16 there, 8 now" in again.outputs[0]
    assert "data.workers" not in again.outputs[0]
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["step"]) == ("error", 2)
    assert "data.global_batch: 16 there, 8 now" in outcome["reason"]


def test_a_bad_image_is_named(start, small, shards, tmp_path):
    data = shutil.copytree(shards, tmp_path / "data")
    for tar in data.glob("train-*.tar"):
        image = bytearray(tar.read_bytes())
        image[512 : 512 + 64] = bytes(64)  # the first member's content begins behind its header
        tar.write_bytes(image)
    ended = start(FINETUNE, ["--debug", *small, "--run-dir", str(tmp_path / "run"), "--data.path", str(data)]).wait()
    assert ended.codes == [2], ended.outputs
    assert "train-00000" in ended.outputs[0]
    assert "cannot decode an image" in ended.outputs[0]
    assert "Traceback" not in ended.outputs[0]


def test_an_index_whose_shard_was_cut_short(refused, shards, tmp_path):
    data = shutil.copytree(shards, tmp_path / "data")
    tar = sorted(data.glob("train-*.tar"))[1]
    whole = tar.stat().st_size
    os.truncate(tar, whole // 2)
    message = refused(["--data.path", str(data)])
    told = f"shard {tar} has {whole // 2} bytes and the manifest says {whole}: it was cut short or replaced; copy it"
    assert told in message


def test_a_clock_that_goes_backwards(finished, start, tmp_path):
    """A run is continued from the newest checkpoint by its step, whatever the times of its files, and goes on alike."""
    run = shutil.copytree(finished / "finetune", tmp_path / "run")
    leaves, whole = json.loads((run / "recipe.json").read_text()), ranks.metrics(run)
    names = ("data.path", "data.global_batch", "augment.image_size", "model.embed_dim", "model.start")
    options = ["--debug", "--run-dir", str(run), "--data.workers", "0", "--schedule.length", "8 steps"]
    for name in (*names, "evaluation.batch", "evaluation.crop_pct"):
        options += [f"--{name}".replace("_", "-"), str(leaves[name])]
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    for path in run.rglob("*"):
        os.utime(path, (2**32, 2**32))  # of the year 2106: the clock has gone back since
    for steps in ("steps 4 to 8", "steps 8 to 8"):
        ended = start(FINETUNE, options).wait()
        assert ended.codes == [0], ended.outputs
        assert steps in ended.outputs[0]
        assert ranks.metrics(run) == whole
    assert (run / "checkpoints" / "latest").read_text() == "step-00000008"
    assert json.loads((run / "outcome.json").read_text())["outcome"] == "done"


def train_on_a_full_disk(options: list[str], strategy: str, limit: int) -> None:
    """No file may grow beyond the limit from the second checkpoint on, which is written behind the training."""
    recipe = parse(finetune_1k.make, finetune_1k.MODELS, "", ["--debug", *options])
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(ranks.ROOT / "ds_configs" / "zero2.json")

    def job(world: World) -> str:
        run = prepare(recipe, dataclasses.replace(world, strategy=strategy))
        with run.record.open(0, 4):
            save(run, 2)
            run.checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            save(run, 4)
            run.checkpoints.wait()
        return "done"

    launch(job, recipe.runtime, Path(recipe.run_dir))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed"])
def test_a_full_disk_leaves_the_older_checkpoint_whole(small, tmp_path, strategy):
    options = [*small, "--run-dir", str(tmp_path / "run")]
    ended = ranks.run_function(train_on_a_full_disk, (options, strategy, 20_000), tmp_path / "logs", 2).wait()
    assert 2 in ended.codes, "\n".join(ended.outputs)
    told = [text for text in ended.outputs if "error: the checkpoint of step 4 cannot be written" in text]
    assert told if strategy == "deepspeed" else len(told) == 2  # ZeRO's own save fails where it fails
    assert all("start again, the run resumes from the newest of them" in text for text in told)
    root = tmp_path / "run" / "checkpoints"
    assert (root / "latest").read_text() == "step-00000002"
    assert (root / "step-00000002" / "COMMITTED").exists()
    assert not (root / "step-00000004").exists()
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["outcome"] == "error"
    assert any(f"error: {outcome['reason']}" in text for text in ended.outputs)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(start, small, tmp_path):
    options = ["--debug", *small, "--run-dir", str(tmp_path / "run")]
    options += ["--schedule.lr", "1e30", "--runtime.log-every", "100%"]  # a check at logged steps would come too late
    ended = start("recipes/pretrain_21k.py", options).wait()
    assert ended.codes == [2], ended.outputs
    assert "number 4 of the steps that had to be skipped, and runtime.max_skipped allows 3" in ended.outputs[0]
    assert "training has diverged" in ended.outputs[0]
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 4
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["outcome"] == "error"
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000002"
