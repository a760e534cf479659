"""tools/bench_shards.py: what it appends, that both sides write the same samples, and what its hours are."""

import hashlib
import json
import tarfile

import pytest

from shards.engine import open_engine
from shards.index import Index
from shards.writing.options import WriteOptions
from tools import bench_shards
from tools.benchmarks import make_images


def members(out):
    """The contents of all tars by name, JSON as objects."""
    found = {}
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return {name: json.loads(data) if name.endswith(".json") else data for name, data in found.items()}


def numbers(tree):
    return [number for value in tree.values() for number in numbers(value)] if isinstance(tree, dict) else [tree]


def test_it_appends_a_line(tmp_path, capsys):
    output = tmp_path / "figures.jsonl"
    output.write_text("{}\n")
    arguments = ["--images", "4", "--repetitions", "1", "--output", str(output)]
    assert bench_shards.main(arguments) == 0
    first, line = output.read_text().splitlines()
    record = json.loads(line)
    assert first == "{}"
    assert {*record} == {"benchmark", "date", "commit", "hardware", "command", "repetitions", "load", "summary"}
    assert record["command"] == f"python tools/bench_shards.py --images 4 --repetitions 1 --output {output}"
    summary = record["summary"]
    compared = {*summary["copy"]["500x375"]["webdataset"]}
    assert compared == {"ours", "webdataset", "ratio", "lowest", "highest"}
    assert {*summary["copy"]} == {*summary["copy unhashed"]} == {"500x375", "224x224"}
    assert {*summary["reencode"]} == {"short:256", "squash:224"}
    assert {*summary["workers"]} == {"none", "short:256"}
    assert all(number >= 0 for number in numbers(summary))
    ratios = [summary["reencode"]["short:256"], *summary["copy unhashed"]["224x224"].values()]
    assert all(0 < found["lowest"] <= found["ratio"] <= found["highest"] for found in ratios)
    assert "copy 500x375, unhashed          webdataset, buffered" in capsys.readouterr().out


@pytest.mark.parametrize("hashed", [True, False])
def test_both_sides_write_the_same_samples(tmp_path, hashed):
    folder, ours, theirs = (tmp_path / name for name in ("images", "ours", "theirs"))
    mean = make_images(folder, (40, 30), 90, 12)
    with open_engine("local", 1) as engine:
        bench_shards.write_ours(folder, ours, WriteOptions(), engine, hashed)
    bench_shards.write_theirs(folder, theirs, -1, hashed)
    written = members(ours)
    assert written == members(theirs)
    assert len(written) == 36
    assert sum(len(data) for name, data in written.items() if name.endswith(".jpg")) == pytest.approx(12 * mean)
    hashed_bytes = (ours / "train-000000.tar").read_bytes() if hashed else b""
    assert Index.load(ours).split("train").shards[0].sha256 == hashlib.sha256(hashed_bytes).hexdigest()


def test_hours():
    summary = {
        "workers": {"none": {"cpu": 1000.0}, "short:256": {"cpu": 100.0}},
        "in order": {"squash:224": 10.0, "none": 10_000.0},
        "gzip_bytes": 250e6,
    }
    assert bench_shards.hours(summary) == {
        "1k, copied": {"1 core": 0.37, "8 cores": 0.046},
        "1k, short:256": {"1 core": 3.698, "8 cores": 0.462},
        "21k-P of winter21, squash:224": {"1 core": 324.187, "8 cores": 47.185},
        "21k-P of resized21k, copied": {"1 core": 0.944, "8 cores": 0.622},
    }


@pytest.mark.parametrize("option", ["--images", "--repetitions"])
def test_numbers_are_positive(option, capsys):
    with pytest.raises(SystemExit):
        bench_shards.main([option, "0"])
    assert "both must be at least 1" in capsys.readouterr().err
