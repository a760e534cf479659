"""--dry-run: what it prints is what a run would be, and it leaves nothing."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import ranks
import torch
from strategies import place, recipe_of

from pipeline.backend import start as join
from pipeline.footprint import Footprint, activations, check_room, measure, memory_of, size
from pipeline.models.build import make_model
from pipeline.preflight.cost import recommended, verdict
from pipeline.preflight.plan import points, workers
from pipeline.prepare import prepare
from pipeline.recipe import parse, sources
from pipeline.trainer import leave, train
from recipes import pretrain_21k
from shards.errors import UserError

PRETRAIN, CHAIN = "recipes/pretrain_21k.py", "recipes/chain.py"
CHEAP, DEAR = ("fsdp", "zero2"), ("ddp", "zero1", "zero3")
WIDE = ["--model.embed-dim", "192", "--model.depth", "3", "--data.accumulation", "1"]


def sections(output: str) -> dict[str, list[str]]:
    """Title up to its colon -> the lines below, the rest of the title first."""
    found: dict[str, list[str]] = {}
    for line in output.splitlines():
        title, colon, rest = line.partition(":")
        if colon and not line.startswith(" "):
            found[title] = [rest.strip()]
        elif found and line.startswith("  "):
            found[[*found][-1]].append(line.strip())
    return found


def number(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in {text}"
    return float(found[1].replace(",", ""))


def test_the_report(start, small, tmp_path):
    """On two ranks of FSDP2, of a new run."""
    run_dir = tmp_path / "run"
    options = ["--debug", *small, "--run-dir", str(run_dir), "--dry-run", "--data.accumulation", "2"]
    options += ["--optimizer.layer-decay", "0.5", "--runtime.peak-tflops", "1"]
    options += ["--optimizer.decay", "matrices"]
    ended = start(PRETRAIN, options, 2, ACCELERATE_USE_FSDP="true").wait()
    assert ended.codes == [0, 0], "\n".join(ended.outputs)
    assert "recipe:" not in ended.outputs[1], "rank 0 alone reports"
    assert not run_dir.exists(), "a dry run leaves something behind"
    report, recipe = sections(ended.outputs[0]), parse(pretrain_21k.make, pretrain_21k.MODELS, "", options)
    fields = {line.split()[0]: re.split(r"  +", line)[-1] for line in report["recipe"][1:]}
    assert fields == sources(recipe)
    assert (fields["seed"], fields["ema_decay"], fields["data.accumulation"]) == ("default", "--debug", "command line")
    model = make_model(recipe, 5)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert report["parameters"][0] == f"{total:,} trained in 8 groups, 0 fixed; adamw"
    groups = [number(line, r"tensors, ([\d,]+) parameters") for line in report["parameters"][1:]]
    assert sum(groups) == total
    assert {number(line, r"rate x ([\d.]+),") for line in report["parameters"][1:]} == {1, 0.5, 0.25, 0.125}
    decays = [number(line, r"weight decay ([\d.]+)") for line in report["parameters"][1:]]
    assert {*decays} == {0, recipe.optimizer.weight_decay}
    named = model.no_weight_decay()
    undecayed = sum(each.numel() for name, each in model.named_parameters() if each.ndim == 1 or name in named)
    assert sum(count for count, decay in zip(groups, decays, strict=True) if not decay) == undecayed
    section = recipe.schedule
    for line, step in zip(report["learning rate"][1:], range(8), strict=True):
        cosine = section.min_lr + (section.lr - section.min_lr) / 2 * (1 + math.cos(math.pi * (step - 1) / 7))
        expected = cosine if step >= 1 else section.warmup_lr
        assert line.split()[:2] == ["step", str(step + 1)]
        assert float(line.split()[2]) == pytest.approx(expected, rel=1e-3)
    assert report["global batch"][0] == "16 = 2 ranks x 2 micro-batches x 4 samples"
    assert report["global batch"][1] == "80 samples make 5 steps an epoch, and 0 are left out of each"
    assert report["global batch"][2] == "8 steps: 1.60 epochs, 128 images"
    assert any(line.startswith("fsdp (this launch): ") for line in report["memory a rank"])
    assert report["memory a rank"][-1].startswith("recommended: ddp, the first that leaves 10% of it free")
    assert "train: 80 samples in " in report["data"][1]
    loaded, taken = (number(report["speed"][1], pattern) for pattern in (r"brings ([\d,]+) im", r"take ([\d,]+) im"))
    assert loaded > 0 < taken
    assert ("decode-bound by" in report["speed"][2]) == (loaded < taken)
    assert "128 images x " in report["the whole run"][1]
    assert "hours x 2 ranks = " in report["the whole run"][2]
    assert "MFU of steps alone" in report["the whole run"][3]
    assert "2 + 1 checkpoints of" in report["disk"][1]


def test_a_dry_run_leaves_a_run_as_it_is(start, small, tmp_path):
    run_dir = tmp_path / "run"
    options = ["--debug", *small, "--run-dir", str(run_dir), "--schedule.cosine-per", "epoch"]
    options += ["--schedule.cooldown", "25%", "--schedule.cooldown-lr", "1e-5"]
    assert start(PRETRAIN, options).wait().codes == [0]
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    ended = start(PRETRAIN, [*options, "--dry-run"]).wait()
    assert ended.codes == [0], ended.outputs
    assert "8 steps, of which 8 are done" in ended.outputs[0]
    rates = sections(ended.outputs[0])["learning rate"]
    assert rates[0] == (
        "1 steps of warm-up, then half a cosine to step 6, moved every 5 steps (an epoch), then 2 steps at 1.0000e-05"
    )
    assert [line.split()[2] for line in rates[1:]][-2:] == ["1.0000e-05"] * 2
    after = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert after == before
    assert json.loads((run_dir / "outcome.json").read_text())["outcome"] == "done"


def test_dry_runs_of_a_chain(start, chain_options, tmp_path):
    options = [*chain_options, "--run-dir", str(tmp_path / "run"), "--pretrain.dry-run"]
    first = start(CHAIN, options).wait()
    assert first.codes == [0], first.outputs
    assert "stage finetune: no dry run of it was asked for" in first.outputs[0]
    both = start(CHAIN, [*options, "--finetune.dry-run"]).wait()
    assert both.codes == [0], both.outputs
    assert "stage finetune: looked at without the weights that pretrain will leave" in both.outputs[0]
    assert both.outputs[0].count("dry run: nothing was trained") == 2
    assert not [*tmp_path.rglob("*.json*")]


def test_a_dry_run_is_refused_as_a_run_is(start, small, tmp_path):
    options = ["--debug", *small, "--run-dir", str(tmp_path / "run"), "--dry-run", "--schedule.warmup", "9 steps"]
    ended = start(PRETRAIN, options).wait()
    assert ended.codes == [2]
    assert "'9 steps' is 9 steps, but schedule.length '8 steps' is only 8" in ended.outputs[0]
    assert not [*tmp_path.rglob("outcome.json")]


def hold_each(strategies: tuple[str, ...], data: Path, root: Path) -> None:
    """Trains two steps under each strategy, and compares what is held then, and on disk, with the estimate."""
    world = join("cpu")
    for strategy in strategies:
        recipe = recipe_of(data, root / strategy, 2, [*WIDE, "--checkpoint.every", "100%", "--runtime.no-pictures"])
        run = prepare(recipe, place(world, strategy, root))
        assert train(run) == "done"
        footprint = measure(recipe, make_model(recipe, 5))
        held, backend = footprint.held(strategy, world.size), run.learner.backend
        updated = max(world.gather(sum(len(shard.tensor) for shard in backend.shards())))
        assert footprint.piece(strategy, world.size) == pytest.approx(updated, rel=0.01)
        assert held.averages == pytest.approx(4 * updated, rel=0.01)
        assert held.states == pytest.approx(max(world.gather(bytes_of_states(backend.stepping))), rel=0.01)
        if strategy == "fsdp":
            weights = sum(parameter.to_local().nbytes for parameter in backend.module.parameters())
            assert held.weights == pytest.approx(max(world.gather(weights)), rel=0.01)
        backend.close()
        (checkpoint,) = (root / strategy / "checkpoints").glob("step-00000002")
        written = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        assert footprint.checkpoint(strategy) == pytest.approx(written, rel=0.1), f"{strategy}: {written}"
        weights = sum(path.stat().st_size for path in (root / strategy / "weights").iterdir())
        assert footprint.weights() == pytest.approx(weights, rel=0.05)
    leave(0)


def bytes_of_states(optimizer: torch.optim.Optimizer) -> int:
    """Of this rank, without what is one number."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.nbytes for tensor in local if tensor.dim())


@pytest.mark.parametrize("strategies", [CHEAP, pytest.param(DEAR, marks=pytest.mark.soak)], ids=str)
def test_the_estimate_is_what_a_run_holds(shards, tmp_path, strategies):
    ended = ranks.run_function(hold_each, (strategies, shards, tmp_path), tmp_path / "logs", 2).wait()
    assert ended.codes == [0, 0], "\n".join(ended.outputs)


def test_activations_are_what_a_forward_pass_keeps(shards, tmp_path):
    recipe = recipe_of(shards, tmp_path, 2, WIDE)
    model, kept = make_model(recipe, 5), {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(torch.zeros(4, 3, 16, 16))
    assert len(outputs) == 2
    expected = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
    assert activations(recipe, 5, 4) == pytest.approx(expected, rel=0.02)
    every = recipe_of(shards, tmp_path, 2, [*WIDE, "--runtime.activation-checkpointing", "1"])
    halved = recipe_of(shards, tmp_path, 2, [*WIDE, "--runtime.precision", "bf16"])
    assert activations(every, 5, 4) < 0.3 * expected
    assert activations(halved, 5, 64) < 0.8 * activations(recipe, 5, 64)


def test_advice():
    recipe = parse(pretrain_21k.make, pretrain_21k.MODELS, "", [])
    footprint = Footprint(recipe, (torch.Size((1000, 1000)),), 10_000, 2)
    four = ["ddp", "zero1", "fsdp", "zero3"]
    assert recommended(footprint, four, 8, 0, 100_000_000).startswith("recommended: ddp, the first that leaves 10%")
    assert recommended(footprint, four, 8, 0, 16_000_000).startswith("recommended: zero1")
    assert recommended(footprint, four, 8, 0, 3_000_000).startswith("recommended: fsdp")
    assert "none of ddp, zero1, fsdp, zero3 leaves 10%" in recommended(footprint, four, 8, 10**9, 3_000_000)
    assert verdict(1000, 2300).startswith("decode-bound by 2.3x: give more --data.workers")
    assert verdict(2300, 1000) == "the loader keeps up: it brings 2.3x what steps take"
    assert "2 workers a rank leave each rank a core" in workers(8, 4, 12)
    assert workers(2, 4, 12).endswith("are 12 processes on 12 cores here")
    assert points(3) == [0, 1, 2]
    assert points(1000) == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert 2**27 < memory_of(torch.device("cpu"), 1) == pytest.approx(2 * memory_of(torch.device("cpu"), 2), abs=1)
    assert [size(each) for each in (0, 1023, 1536, 3 * 2**30)] == ["0 B", "1,023 B", "1.5 KiB", "3.0 GiB"]


def test_a_disk_without_room_for_a_checkpoint(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_room(free // 2, free, tmp_path)
    with pytest.raises(UserError, match=r"a checkpoint takes about .* but the disk of run_dir .* has only .* left"):
        check_room(free * 2, free, tmp_path)
