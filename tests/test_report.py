"""The page about runs: what it says, that nothing in it can do harm, and that a real browser draws it."""

import itertools
import json
import math
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import browser
import numpy as np
import pytest

from pipeline.record import read_recipe
from pipeline.report.__main__ import main
from pipeline.report.curves import MAX_POINTS, thinned
from pipeline.status import read_facts
from pipeline.status.words import large
from pipeline.telemetry.flops import forward_flops

HOSTILE = "</script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>"


class Page(HTMLParser):
    """What a page holds: tags with their attributes, the cells of table rows by the first one, text, and figures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[str]] = {}
        self.text, self._row, self._scripts = "", [], []
        self.feed(path.read_text())
        self.figures = {figure["id"]: figure for figure in json.loads(self._scripts[0])}

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("th", "td"):
            self._row.append("")
        if tag == "script":
            self._scripts.append("")

    def handle_endtag(self, tag):
        if tag == "tr":
            self.rows.setdefault(self._row[0], self._row[1:])
            self._row = []

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self._scripts[-1] += data
            return
        self.text += data
        if self._row:
            self._row[-1] += data

    def all(self, tag: str, name: str) -> list[str | None]:
        return [attributes.get(name) for found, attributes in self.tags if found == tag]


def report(output: Path, *arguments: object) -> Page:
    assert main([*map(str, arguments), "-o", str(output)]) == 0
    return Page(output)


@pytest.fixture(scope="module")
def path(finished, tmp_path_factory) -> Path:
    """The page of a finished chain; `page` is what it holds."""
    output = tmp_path_factory.mktemp("page") / "chain.html"
    assert main([str(finished), "--price", "3.5", "-o", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def page(path) -> Page:
    return Page(path)


def test_the_figures_of_both_stages(page, finished):
    pretrain, finetune = (read_facts(finished / name) for name in ("pretrain", "finetune"))
    last = pretrain.evaluations[-1], finetune.evaluations[-1]
    for head in ("memory", "process"):
        for prefix, weights in (("", "raw"), ("ema_", "averaged")):
            row = page.rows[f"Top-1, {head} head, {weights}"]
            assert row[:2] == [f"{line[f'{prefix}{head}_top1']:.2%}" for line in last]
    assert set(page.rows["State"]) == {"done"}
    assert page.rows["Steps"][:2] == ["8 of 8 (1.6 epochs)"] * 2
    assert [*page.rows["Images trained on"][:2], page.rows["Images trained on"][-1]] == ["128", "128", "256"]
    assert page.rows["Start weights"][:2] == ["-", f"{finished}/pretrain/weights/ema.safetensors"]
    every = ("pretrain", "finetune", "evaluate", "export")
    hours = [read_facts(finished / name).outcome["seconds"] / 3600 for name in every]
    for name, factor, form in (("Process hours (GPU hours)", 1, ".3g"), ("Price", 3.5, ".2f")):
        assert page.rows[name] == [format(factor * number, form) for number in (*hours, sum(hours))]
    assert page.rows["augment.mixup"][:2] == ["false", "true"], "what differs comes first"
    flops = [128 * 3 * forward_flops(read_recipe(facts.path), 5, 2) for facts in (pretrain, finetune)]
    assert sum(flops) > 256 * 3 * 2 * 20_000, "a multiplication and an addition a weight, at least"
    assert page.rows["Floating-point operations of training"][-1] == f"{large(sum(flops))}FLOP"


def test_the_curves_are_the_metrics(page, finished):
    facts = read_facts(finished / "pretrain")
    lines = {trace["name"]: trace for trace in page.figures["plot-evaluated_top1"]["data"]}
    averaged = lines["pretrain: memory head, averaged weights"]
    assert averaged["x"] == list(range(1, 9))
    assert averaged["y"] == [line["ema_memory_top1"] for line in facts.evaluations]
    assert len(lines) == 8, "two runs, two heads, raw and averaged"
    for field in ("loss", "lr", "grad_norm", "images_per_second", "data_wait"):
        trace = page.figures[f"plot-{field}"]["data"][0]
        assert trace["y"] == pytest.approx([line[field] for line in facts.steps], rel=1e-12)
    assert trace["meta"] == {"run": 0, "epoch": 1 / 5, "images": 16}


def test_pictures_and_worst_mistakes(page, finished):
    sources = page.all("img", "src")
    assert all(source.startswith("data:image/") for source in sources)
    for title in ("Samples as the model was given them", "What it reads", "What it writes"):
        assert page.text.count(title) == 2
    for name in ("pretrain", "finetune"):
        top1 = read_facts(finished / name).evaluations[-1]["ema_memory_top1"]
        wrong = round(23 * (1 - top1))
        assert f"{wrong} of the first 23 of 23 images of split val are wrong by ema.safetensors" in page.text
    assert page.text.count("taken for") == len(sources) - 6


def test_the_chain_is_drawn(page):
    boxes = [attributes["class"] for tag, attributes in page.tags if tag == "g"]
    assert set(boxes) == {"box done"}
    assert len([mark for mark in page.all("path", "marker-end") if mark]) == len(boxes) - 1, "one stage starts anew"
    assert "every stage is finished" in page.text


def test_nothing_is_loaded_and_nothing_sent(page, path):
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "srcset"):
            assert not (attributes.get(name) or "").startswith(("http:", "https:", "//")), (tag, attributes)
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; img-src data: blob:; ")
    assert "showSendToCloud: false" in path.read_text()
    assert 4e6 < path.stat().st_size < 9e6, "plotly's script, once, and pictures"


def test_hostile_names(finished, shards, tmp_path):
    run = tmp_path / "<img src=x onerror=alert(3)>"
    shutil.copytree(finished / "pretrain", run)
    data = shutil.copytree(shards, tmp_path / "data")
    index = json.loads((data / "index.json").read_text())
    index["classes"] = [f"{HOSTILE}{number}" for number in range(5)]
    (data / "index.json").write_text(json.dumps(index))
    (run / "classes.json").write_text(json.dumps(index["classes"]))
    recipe = json.loads((run / "recipe.json").read_text()) | {"data.path": str(data), "wandb": HOSTILE}
    (run / "recipe.json").write_text(json.dumps(recipe))
    (run / "outcome.json").write_text(json.dumps({"outcome": "error", "step": 8, "reason": HOSTILE}))
    attempt = {"started": 1e9, "step": 4, "host": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    with (run / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(attempt) + "\n")
    chain = {"stages": [{"name": HOSTILE, "run_dir": run.name, "kind": HOSTILE, "after": [HOSTILE]}]}
    (tmp_path / "chain.json").write_text(json.dumps(chain))
    for arguments in ([run], [tmp_path], [run, finished]):
        page = report(tmp_path / "hostile.html", *arguments)
        assert page.all("script", "src") == [None] * 3
        assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
        assert page.text.count(HOSTILE) >= (1 if arguments == [tmp_path] else 5)
        assert all(source.startswith("data:image/") for source in page.all("img", "src"))
    restarts = [trace for trace in page.figures["plot-loss"]["data"] if trace["name"] == "restarts"]
    assert [trace["x"] for trace in restarts] == [[4]]
    assert "&lt;img src=x" in restarts[0]["text"][0], "plotly's own markup"


def test_what_is_left_of_a_run(finished, tmp_path):
    """Killed: no outcome, no weights, a torn line, and data that is gone."""
    run = shutil.copytree(finished / "pretrain", tmp_path / "killed")
    (run / "outcome.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "los')
    for file in run.rglob("*"):
        os.utime(file, (1e9, 1e9))
    weights = [file.rename(file.with_suffix(".gone")) for file in (run / "weights").iterdir()]
    page = report(tmp_path / "killed.html", run)
    assert page.rows["State"] == ["dead"]
    assert "has no weights/model.safetensors" in page.text
    assert page.figures["plot-loss"]["data"][0]["x"] == list(range(1, 9))
    for file in weights:
        file.rename(file.with_suffix(".safetensors"))
    recipe = json.loads((run / "recipe.json").read_text()) | {"data.path": str(tmp_path / "gone")}
    (run / "recipe.json").write_text(json.dumps(recipe))
    (reason,) = [line for line in report(tmp_path / "killed.html", run).text.split("\n") if "Not to be had" in line]
    assert f"{tmp_path}/gone" in reason


def test_data_of_other_classes_judges_no_run(finished, shards, tmp_path):
    run, data = shutil.copytree(finished / "pretrain", tmp_path / "run"), shutil.copytree(shards, tmp_path / "data")
    index = json.loads((data / "index.json").read_text())
    (data / "index.json").write_text(json.dumps(index | {"classes": index["classes"][::-1]}))
    recipe = json.loads((run / "recipe.json").read_text()) | {"data.path": str(data)}
    (run / "recipe.json").write_text(json.dumps(recipe))
    text = report(tmp_path / "page.html", run).text
    assert f"Not to be had: the data in {data} has other classes than the run was trained on, which are in its" in text
    assert "taken for" not in text


def test_files_of_a_run_below_a_directory_of_that_name(finished, tmp_path):
    run = shutil.copytree(finished / "pretrain", tmp_path / "checkpoints" / "run")
    (run / "gone").symlink_to("nowhere")
    text = report(tmp_path / "page.html", run).text
    assert "weights/ema.safetensors (" in text
    assert "step-00000008" not in text


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\xff{", b"[1]\nnull\n", b"[" * 5000, b'{"step": "x", "stages": [1, {"name": ["a"]}]}\n'],
    ids=["empty", "binary", "no objects", "deep", "other types"],
)
def test_files_that_are_anything(content, tmp_path):
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    names = ["recipe.json", "metrics.jsonl", "attempts.jsonl", "quarantine.jsonl", "skipped.jsonl", "outcome.json"]
    for name in [*names, "evaluation.json", "chain.json", "logs/rank-0.log"]:
        (run / name).write_bytes(content)
    page = report(tmp_path / "page.html", run)
    assert page.rows["State"][0] in ("dead", "error", "running", "waiting")


def test_values_that_are_anything(finished, tmp_path):
    """Of the right shape, with no number where one is expected, or one that is none."""
    run = shutil.copytree(finished / "pretrain", tmp_path / "run")
    fields = list(read_facts(run).steps[0]) + list(read_facts(run).evaluations[0])
    odd = [None, "x", [1], {"a": 1}, True, -1, 1e308, 1e-320, math.nan, math.inf, 10**400, 0]
    with (run / "metrics.jsonl").open("a") as file:
        for place, value in enumerate(odd):
            line = dict.fromkeys(fields, value) | {"step": 9 + place}
            file.write(json.dumps(line) + "\n" + json.dumps({k: v for k, v in line.items() if k != "split"}) + "\n")
    with (run / "attempts.jsonl").open("a") as file:
        file.writelines(json.dumps({"started": value, "step": value, "world": value}) + "\n" for value in odd)
    recipe = json.loads((run / "recipe.json").read_text())
    for shift in (0, 4, 8):
        values = itertools.cycle(odd[shift:] + odd[:shift])
        (run / "recipe.json").write_text(json.dumps(dict(zip(recipe, values, strict=False))))
        outcome = dict(zip(("outcome", "step", "seconds", "images"), values, strict=False))
        (run / "outcome.json").write_text(json.dumps(outcome))
        assert report(tmp_path / "page.html", run, "--price", "2").rows["State"] == ["error"]


def test_a_chain_as_it_goes(finished, tmp_path):
    """Stages of every kind, one of which ran again, and one that has not begun."""
    stages = [
        {"name": "pretrain", "kind": "train", "after": [], "run_dir": "pretrain"},
        {"name": "finetune", "after": ["pretrain"], "run_dir": "finetune", "earlier": ["finetune-old"]},
        {"name": "control", "after": ["nobody", "control", "publish"]},
        {"name": "judge", "kind": "evaluate", "after": ["finetune", "pretrain"]},
        {"name": "publish", "kind": "export", "after": ["judge"]},
    ]
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chain.json").write_text(json.dumps({"stages": stages}))
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "outcome.json").write_text('{"outcome": "done", "seconds": 7}')
    scores = {"weights": "finetune/weights/ema.safetensors", "memory_top1": 0.5, "other": "thing"}
    (tmp_path / "judge" / "evaluation.json").write_text(json.dumps(scores))
    page = report(tmp_path / "page.html", tmp_path)
    assert page.rows["State"] == ["done", "done", "waiting", "done", "waiting"]
    assert page.rows["Top-1, memory head, averaged"][3] == "50.00%"
    assert page.rows["Top-1, memory head, raw"][3] == "-"
    for text in ("done · 7 s · evaluate", "waiting · export", "thing"):
        assert text in page.text
    assert page.text.count("· run 2") == 1
    assert len([mark for mark in page.all("path", "marker-end") if mark]) == 5


def test_long_curves_are_thinned():
    xs, ys = list(range(100_000)), np.linspace(0, 1, 100_000).tolist()
    few_xs, few_ys = thinned(xs, ys)
    assert len(few_xs) == len(few_ys) <= MAX_POINTS
    assert few_xs[-1] == xs[-1]
    assert np.mean(few_ys) == pytest.approx(0.5, abs=1e-3)
    assert thinned(xs[:MAX_POINTS], ys[:MAX_POINTS]) == (xs[:MAX_POINTS], ys[:MAX_POINTS])


def test_what_is_refused(finished, tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} is no run: give a directory that a recipe wrote as its --run-dir, or a chain's\n"
    )
    (tmp_path / "taken").mkdir()
    assert main([str(finished / "finetune"), "-o", str(tmp_path / "taken")]) == 2
    assert f"cannot write {tmp_path}/taken" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([str(finished / "finetune"), "-o", str(tmp_path / "file" / "page.html")]) == 2
    assert f"cannot write {tmp_path}/file/page.html: File exists" in capsys.readouterr().err


def test_a_real_browser_draws_it(path, tmp_path):
    if not (found := browser.find()):
        pytest.skip(f"no Chromium is here to look at the page: {browser.INSTALL}")
    with browser.opened(found, tmp_path / "profile") as tab:
        tab.resize(1280, 900)
        tab.visit(path)
        assert tab.evaluate("document.querySelectorAll('.plot > .plot-container .main-svg').length") >= 8
        points = (
            "[...document.querySelectorAll('#plot-loss .trace')].map((one) => one.querySelectorAll('.point').length)"
        )
        assert tab.evaluate(points) == [8, 8], "steps of two runs"
        assert tab.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
        tab.evaluate("document.querySelector('input[value=images]').click()")
        assert tab.evaluate("document.getElementById('plot-loss').data[0].x") == list(range(16, 129, 16))
        tab.wait_until("document.querySelector('#plot-loss .xtitle').textContent === 'images'")
        tab.evaluate("document.querySelector('input[name=run][value=\"1\"]').click()")
        tab.wait_until(f"JSON.stringify({points}) === '[8]'")
        assert tab.evaluate("document.querySelectorAll('[data-title*=Share]').length") == 0
        light = tab.screenshot()
        tab.resize(1280, 900, dark=True)
        dark = tab.screenshot()
        tab.resize(390, 800)
        tab.wait_until("document.documentElement.scrollWidth <= 390")  # nothing sticks out on a phone
        assert tab.told == []
        assert {url.partition(":")[0] for url in tab.requests} <= {"file", "data", "blob"}
        assert [url for url in tab.requests if url.startswith("file")] == [path.as_uri()]
    for picture, ground in ((light, 255), (dark, 25)):
        assert picture.shape[1] == 1280
        assert picture.shape[0] > 2000, "the whole page"
        assert len(np.unique(picture[::3, ::3].astype(int) @ (65536, 256, 1))) > 100, "colours"
        assert abs(int(np.median(picture[:, :, 0])) - ground) < 20
