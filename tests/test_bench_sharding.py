"""tools/bench_sharding.py: that FSDP2 and ZeRO-3 hold what was promised, and what the command appends."""

import json
from pathlib import Path

import pytest
import ranks
import timm
from strategies import place

from pipeline.backend import start
from pipeline.trainer import leave
from tools import bench_sharding

PROMISED = 0.55
MODEL, IMAGE_SIZE = "test_vit", 32


def measure_each(root: Path) -> None:
    world = start("cpu")
    held = {
        strategy: bench_sharding.measure(place(world, strategy, root), MODEL, IMAGE_SIZE)
        for strategy in bench_sharding.STRATEGIES
    }
    if world.is_main:
        (root / "held.json").write_text(json.dumps(held))
    leave(0)


def check(summary: dict) -> None:
    num_parameters = sum(parameter.numel() for parameter in timm.create_model(MODEL, img_size=IMAGE_SIZE).parameters())
    assert summary["ddp"]["parameters"] == 4 * num_parameters
    assert summary["ddp"]["optimizer"] == pytest.approx(8 * num_parameters, rel=0.001)  # and the step's own counters
    for strategy in ("fsdp", "zero3"):
        assert 0.5 <= summary[strategy]["ratio"] <= PROMISED
        for kind in bench_sharding.KINDS:
            assert 0.49 < summary[strategy][kind] / summary["ddp"][kind] <= PROMISED


def test_what_a_rank_of_two_holds(tmp_path):
    ended = ranks.run_function(measure_each, (tmp_path,), tmp_path / "logs", 2).wait()
    assert ended.codes == [0, 0], "\n".join(ended.outputs)
    check(bench_sharding.summary(json.loads((tmp_path / "held.json").read_text())))


@pytest.mark.soak
def test_it_appends_a_line(tmp_path, capfd):
    output = tmp_path / "figures.jsonl"
    options = ["--model", MODEL, "--image-size", str(IMAGE_SIZE), "--device", "cpu", "--output", str(output)]
    assert bench_sharding.main(options) == 0
    (record,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert (record["benchmark"], record["world"], record["model"]) == ("sharding", 2, MODEL)
    check(record["summary"])
    assert capfd.readouterr().out.count("of DDP's") == 3


def test_one_process_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_info:
        bench_sharding.main(["--processes", "1"])
    assert exit_info.value.code == 2
    assert "--processes 1: at least 2, for one shares nothing" in capsys.readouterr().err
