"""tools/bench_shampoo.py: what it appends, that its parts are Shampoo's step, and what it concludes from them."""

import argparse
import json

import pytest
import torch

from pipeline import optim
from pipeline.recipe import Optimizer, Shampoo
from tools import bench_shampoo

TINY = ["--embed-dim", "24", "--depth", "1", "--image-size", "28", "--classes", "5", "--batch", "2", "--max-dim", "32"]


def test_it_appends_a_line(tmp_path, capsys):
    output = tmp_path / "figures.jsonl"
    output.write_text("{}\n")
    assert bench_shampoo.main([*TINY, "--repetitions", "1", "--output", str(output)]) == 0
    first, line = output.read_text().splitlines()
    record = json.loads(line)
    assert first == "{}"
    assert {"benchmark", "date", "commit", "hardware", "command", "device", "repetitions", "load"} < {*record}
    summary = record["summary"]
    assert {*summary["seconds"]} == {*bench_shampoo.PARTS}
    assert min(summary["seconds"].values()) > 0
    printed = capsys.readouterr().out
    assert all(f"{part:<24}{value:>12.4f}" in printed for part, value in summary["seconds"].items())
    batches = list(summary["batch_a_rank_for_10_percent"].values())
    assert batches == sorted(batches, reverse=True)


def test_its_parts_are_a_step_of_shampoo():
    tiny = {"embed_dim": 24, "depth": 1, "image_size": 28, "classes": 5, "batch": 2, "max_dim": 32}
    options = argparse.Namespace(model="vittm_tiny", **tiny)
    torch.manual_seed(0)
    model = bench_shampoo.make_model(options)
    bench = bench_shampoo.Bench(model, options)
    bench._backward()
    copied = bench_shampoo.make_model(options)
    copied.load_state_dict(model.state_dict())
    section = Optimizer("shampoo", shampoo=Shampoo(max_preconditioner_dim=32, start_preconditioning_step=1))
    whole = optim.make_optimizer(copied, section, optim.group(copied, 1.0))
    for parameter, other in zip(copied.parameters(), model.parameters(), strict=True):
        parameter.grad = other.grad.clone()
    bench._step_of_shampoo()
    whole.step()
    torch.testing.assert_close(dict(copied.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)


def test_the_batch_is_where_shampoo_takes_a_tenth_more():
    seconds = {"gradients": 8.0, "adamw": 0.5, "factors": 3.0, "directions": 2.0, "roots": 100.0, "apply": 1.0}
    found = bench_shampoo.summary(seconds, batch=32, frequency=100)
    assert found["step"] == {"adamw": 8.5, "shampoo": 15.0, "overhead": pytest.approx(6.5 / 8.5, abs=1e-4)}
    for world, batch in found["batch_a_rank_for_10_percent"].items():
        for size, is_enough in ((batch, True), (batch - 1, False)):
            shampoo = 6.0 / world + 1.0 + size * 0.25
            assert (shampoo <= 1.1 * (0.5 + size * 0.25) * (1 + 1e-12)) is is_enough


def test_a_batch_of_none_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_info:
        bench_shampoo.main(["--batch", "0"])
    assert exit_info.value.code == 2
    assert "batch 0, 5 repetitions: both must be at least 1" in capsys.readouterr().err
