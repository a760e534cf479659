"""`make soak`: the launch files side by side, and ranks killed at many random moments."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import ranks

pytestmark = pytest.mark.soak
LAUNCH_FILES = ("ddp_cpu2", "fsdp_cpu2", "zero1_cpu2", "zero2_cpu2", "zero3_cpu2")
FINETUNE, CHAIN = "recipes/finetune_1k.py", "recipes/chain.py"
STEPS = 20
TOLERANCE = 1e-5


def launched(launch_file: str, script: str, options: list[str], log: Path) -> None:
    assert ranks.accelerate(launch_file, script, options, log).wait(ranks.PATIENCE) == 0, log.read_text()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_launch_files_side_by_side(start, small, tmp_path, accumulation):
    options = ["--debug", *small, "--schedule.length", f"{STEPS} steps", "--model.drop-path-rate", "0"]
    options += ["--data.accumulation", str(accumulation), "--run-dir"]
    assert start(FINETUNE, [*options, str(tmp_path / "one")]).wait().codes == [0]
    for launch_file in LAUNCH_FILES:
        launched(launch_file, FINETUNE, [*options, str(tmp_path / launch_file)], tmp_path / f"{launch_file}.log")
    found = {name: ranks.metrics(tmp_path / name) for name in ("one", *LAUNCH_FILES)}
    print(f"\nlosses, accumulation {accumulation}\nstep {'  '.join(f'{name:>12}' for name in found)}")
    for lines in zip(*found.values(), strict=True):
        if "split" not in lines[0]:
            losses = [line["loss"] for line in lines]
            print(f"{lines[0]['step']:4d} {'  '.join(f'{loss:12.7f}' for loss in losses)}")
            assert losses == pytest.approx([losses[0]] * len(losses), rel=TOLERANCE)


@pytest.mark.parametrize("launch_file", LAUNCH_FILES)
def test_killed_in_each_stage_and_between_them(chain_options, tmp_path, launch_file):
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"\n{launch_file}: seed {seed}")
    whole = tmp_path / "whole"
    launched(launch_file, CHAIN, [*chain_options, "--run-dir", str(whole)], tmp_path / "whole.log")
    chain_options += ["--pretrain.data.workers", "1", "--finetune.data.workers", "2"]  # which alters nothing
    for number, moment in enumerate(moments(random.Random(seed))):
        killed, log = tmp_path / f"killed-{number}", tmp_path / f"killed-{number}.log"
        launcher = ranks.accelerate(launch_file, CHAIN, [*chain_options, "--run-dir", str(killed)], log)
        if isinstance(moment, int):
            stage = "pretrain" if moment < 0 else "finetune"
            ranks.kill_at(launcher, killed / stage / "metrics.jsonl", abs(moment))
        else:
            ranks.kill_when_there(launcher, killed / moment)
        assert launcher.wait(ranks.PATIENCE) == 1
        launched(launch_file, CHAIN, [*chain_options, "--run-dir", str(killed)], log)
        for name in ("pretrain", "finetune"):
            assert ranks.metrics(killed / name) == ranks.metrics(whole / name), moment
        for weights in ("finetune/weights/ema.safetensors", "export/timm/model.safetensors"):
            assert (killed / weights).read_bytes() == (whole / weights).read_bytes(), moment
        print(f"killed at {moment}: the same weights")


def moments(draws: random.Random) -> list[int | str]:
    """When a chain is killed: after so many lines of metrics (below 0 the first stage's), or as soon as there is a
    checkpoint's temporary directory, or a file that is written between two stages."""
    saving = [f"{stage}/checkpoints/step-{draws.choice([2, 4, 6]):08d}.tmp" for stage in ("pretrain", "finetune")]
    between = ["pretrain/outcome.json", "finetune/provenance.json", "finetune/outcome.json", "export/provenance.json"]
    return [-draws.randint(1, 7), draws.randint(1, 7), *saving, *between]


def test_the_demo_from_end_to_end(tmp_path):
    """Ten steps a stage: that every command of `make demo` runs, not what it learns."""
    options = ["--debug", "--data", str(tmp_path / "data"), "--run-dir", str(tmp_path / "run")]
    subprocess.run([sys.executable, "tools/demo.py", *options], cwd=ranks.ROOT, check=True, timeout=ranks.PATIENCE)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary) == {"chain", "scratch", "few", "pretrain", "seconds"}
    assert set(summary["chain"]) == set(summary["scratch"]) == {"top1", "top5"}
    assert [len(summary["few"][start]) for start in ("chain", "scratch")] == [3, 3]
    assert summary["pretrain"]["images"] == 10 * 64
