"""tools/bench_model.py: what it appends, and what it refuses."""

import json

import pytest
import torch

from tools import bench_model


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_appends_a_line(tmp_path, capsys):
    output = tmp_path / "figures.jsonl"
    output.write_text("{}\n")
    sizes = ["--models", "vittm_small", "--batches", "1", "--train-batch", "1", "--threads", "1", "--repetitions", "2"]
    assert bench_model.main([*sizes, "--output", str(output)]) == 0
    first, line = output.read_text().splitlines()
    assert first == "{}"
    record = json.loads(line)
    assert {*record} == {"benchmark", "date", "commit", "hardware", "command", "load", "repetitions", "summary"}
    measured = record["summary"]["vittm_small"]
    for what, (found,) in measured.items():
        assert (found["what"], found["batch"], found["threads"]) == (what, 1, 1)
        assert found["ms"].keys() == {"vittm_small", "vit_small_patch16_224"}
        assert 0 < found["lowest"] <= found["highest"]
        ours, theirs = found["ms"].values()
        assert found["ratio"] == pytest.approx(theirs / ours, rel=0.01)
    assert "vittm_small, latency, batch 1, 1 threads" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "0"], "batches, threads and repetitions are [0, 1, 2, 16, 7]: each must be at least 1"),
        (["--models", "vit"], "invalid choice: 'vit'"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda, but torch finds no CUDA device here: leave --device out",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_refusals(options, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        bench_model.main(options)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
