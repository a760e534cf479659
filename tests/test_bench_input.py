"""tools/bench_input.py: what it appends, that the loaders of our environment give batches of one kind, its figures."""

import gc
import importlib.util
import json
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from tools import bench_input, input_figures, input_ours
from tools.input_data import LOADERS_FILE, Data
from tools.input_figures import DECODE_ONLY, FAST, MARKERS, OURS, PLAIN, RANDAUGMENT, Run
from tools.input_plot import draw_rates

SIZE = "224x224"
OPTIONS = ["--images", "256", "--different", "4", "--rounds", "1", "--sizes", SIZE]


@pytest.fixture(scope="module")
def loaders():
    spec = importlib.util.spec_from_file_location("loaders", LOADERS_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    found = Data(root, 256, 4)
    found.prepare(SIZE, "markers", root)
    return found


def test_it_appends_a_line(data, tmp_path, capsys):
    output = tmp_path / "figures.jsonl"
    output.write_text("{}\n")
    arguments = [str(data.root), *OPTIONS, "--loaders", "webdataset", "--output", str(output)]
    assert bench_input.main([*arguments, "--plot", str(tmp_path / "plot.png")]) == 0
    first, line = output.read_text().splitlines()
    assert first == "{}"
    record = json.loads(line)
    names = {"benchmark", "date", "commit", "hardware", "command", "load", "repetitions", "num_images", "bytes"}
    assert {*record} == names | {"versions", "summary"}
    assert record["versions"]["webdataset"].keys() == {"torch", "torchvision", "pillow", "numpy", "webdataset"}
    rates = record["summary"]["rates"][SIZE][PLAIN]
    assert {*rates} == {DECODE_ONLY, "webdataset"}
    assert rates[DECODE_ONLY]["of_decode_only"] == 1.0
    assert all(0 < found["lowest"] == found["cpu"] == found["highest"] for found in rates.values())
    assert all(found["wall"] > 0 for found in rates.values())
    assert "2 runs, 1 times: about 0 minutes" in capsys.readouterr().out
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.format == "PNG"


def test_what_is_there_is_used_again(data):
    files = {path: path.stat().st_mtime_ns for path in data.root.rglob("*")}
    data.prepare(SIZE, "markers", data.root)
    assert files == {path: path.stat().st_mtime_ns for path in data.root.rglob("*")}
    assert len([*data.folder(SIZE, "images").rglob("*.JPEG")]) == 281
    assert data.mean_bytes(SIZE)["markers"] > 20_000


@pytest.mark.parametrize(("name", "form"), [("image_folder", "images"), ("webdataset", "markers"), ("timm", "markers")])
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's, where it is left half read
def test_peers_give_batches(loaders, data, name, form, monkeypatch):
    monkeypatch.setattr(loaders, "WORKERS", 0)  # a fork of this process could hang
    with closing(getattr(loaders, name)(data.folder(SIZE, form), randaugment=True)) as batches:
        images = next(batches)
    del batches
    gc.collect()
    assert (*images.shape, images.dtype) == (64, 3, 224, 224, torch.uint8)


@pytest.mark.parametrize("path", ["exact", "fast"])
def test_ours_gives_batches(data, path):
    with closing(getattr(input_ours, path)(data.folder(SIZE, "markers"), randaugment=True)) as batches:
        images = next(batches)
    assert (*images.shape, images.dtype) == (64, 3, 224, 224, torch.uint8)


def test_decode_only_decodes_every_image(loaders, data):
    with closing(loaders.decode_only(data.folder(SIZE, "images"), randaugment=False)) as batches:
        decoded = [*next(batches), *next(batches)]
    assert len({np.asarray(image).tobytes() for image in decoded}) == 4


def test_a_failed_run_is_told(tmp_path, capsys):
    broken = Data(tmp_path, 256, 4)
    for form in ("images", "shards"):
        (broken.folder(SIZE, form) / "n0").mkdir(parents=True)
    (broken.folder(SIZE, "images") / "n0" / "a.JPEG").write_bytes(b"no JPEG")
    assert bench_input.main([str(tmp_path), *OPTIONS, "--loaders", "webdataset"]) == 1
    error = capsys.readouterr().err
    assert "loaders:decode_only" in error
    assert "ValueError" in error


def test_the_time_of_other_processes_counts(loaders):
    before = loaders.cpu_seconds()
    work = "import sys, time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    running = loaders.cpu_seconds()
    child.communicate()
    assert running - before >= 0.25  # in ticks of 10 ms
    assert loaders.cpu_seconds() >= running


def test_figures():
    rates = {
        Run(SIZE, PLAIN, DECODE_ONLY): [(1000.0, 900.0), (3000.0, 2900.0), (2000.0, 1900.0)],
        Run(SIZE, PLAIN, FAST): [(1100.0, 2000.0), (1500.0, 3000.0), (1600.0, 1000.0)],
        Run(SIZE, PLAIN, "webdataset"): [(500.0, 800.0), (500.0, 800.0), (500.0, 800.0)],
        Run(SIZE, RANDAUGMENT, OURS): [(500.0, 1000.0)] * 3,
        Run(SIZE, RANDAUGMENT, MARKERS): [(800.0, 1000.0)] * 3,
    }
    summary = input_figures.report(rates, {SIZE: {"shards": 40_000, "markers": 50_000}}, 2000)
    fast = {"cpu": 1500.0, "lowest": 1100.0, "highest": 1600.0, "wall": 2000.0, "of_decode_only": 0.75}
    assert summary["rates"][SIZE][PLAIN][FAST] == fast
    compared = {goal["against"]: goal for goal in summary["goals"]}
    assert {*compared} == {DECODE_ONLY, "webdataset"}
    told = ("ratio", "lowest", "highest", "goal")
    assert [compared[DECODE_ONLY][name] for name in told] == [0.75, 0.5, 1.1, 0.9]
    assert [compared["webdataset"][name] for name in told] == [3.0, 2.2, 3.2, 2.0]
    exact, spliced = {"cores": 4.0, "MB/s": 80.0, "IOPS": 2000}, {"cores": 2.5, "MB/s": 100.0, "IOPS": 2000}
    assert summary["needs"] == {"pretrain_21k": {OURS: exact, MARKERS: spliced}}


def test_bars_are_as_long_as_rates(tmp_path):
    def numbers(rate):
        return {"cpu": rate, "lowest": rate, "highest": rate}

    draw_rates({SIZE: {PLAIN: {OURS: numbers(100.0), "timm": numbers(50.0)}}}, tmp_path / "plot.png")
    pixels = np.asarray(Image.open(tmp_path / "plot.png").convert("RGB")).astype(int)
    lengths = [np.abs(pixels - colour).sum(2).__lt__(6).sum(1).max() for colour in ([31, 111, 178], [184, 190, 198])]
    assert lengths[0] == pytest.approx(2 * lengths[1], rel=0.02)


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [("--images", "255", "at least 256"), ("--rounds", "0", "at least 1"), ("--different", "0", "at least 1")],
)
def test_numbers_have_limits(option, value, reason, capsys):
    with pytest.raises(SystemExit):
        bench_input.main(["data", option, value])
    assert reason in capsys.readouterr().err
