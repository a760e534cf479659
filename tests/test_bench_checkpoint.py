"""tools/bench_checkpoint.py: what it appends; not how quick anything is."""

import json

import pytest
import timm


@pytest.mark.soak
@pytest.mark.parametrize(
    ("size", "environment"), [(1, {}), (2, {"ACCELERATE_USE_FSDP": "true"})], ids=["one process", "two of fsdp"]
)
def test_it_appends_a_line(start, tmp_path, size, environment):
    options = ["--model", "test_vit", "--image-size", "32", "--repetitions", "2", "--device", "cpu"]
    options += ["--directory", str(tmp_path), "--output", str(tmp_path / "figures.jsonl")]
    ended = start("tools/bench_checkpoint.py", options, size, **environment).wait()
    assert ended.codes == [0] * size, "\n".join(ended.outputs)
    (record,) = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert (record["world"], record["repetitions"]) == (size, 2)
    assert record["strategy"] == ("fsdp" if environment else "ddp")
    assert set(record["summary"]) == {"copy alone", "asynchronous", "behind", "at once"}
    assert all(seconds > 0 for seconds in record["summary"].values())
    parameters = sum(parameter.numel() for parameter in timm.create_model("test_vit", img_size=32).parameters())
    held = 4 * 4 * parameters  # weights, two moments and the average
    assert 2 * held < record["bytes"] < 2.5 * held, "two checkpoints"
    assert "asynchronous" in ended.outputs[0]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["logs"]
