"""--recipe FILE and --print: what is printed and run again is the same run."""

import json
import platform
import re
import socket
from importlib.metadata import version
from pathlib import Path

import pytest
import ranks

from pipeline.recipe import flatten, parse, sources
from pipeline.record import code_version
from recipes import chain, demo, finetune_1k, pretrain_21k
from shards.index import Index

FINETUNE = "recipes/finetune_1k.py"
TRICKY = ("a: b # c", "yes", "off", "1e5", "null", "  spaces ", "-x", "é 😀", '"quoted"', "~", "0x10", "{a}", "")


def parsed(options: list[str], module=finetune_1k):
    models = (demo.MODEL,) if module is demo else pretrain_21k.MODELS
    return parse(module.make, models, "", options)


def printed(options: list[str], capsys, module=finetune_1k) -> str:
    with pytest.raises(SystemExit) as exit_info:
        parsed([*options, "--print"], module)
    assert exit_info.value.code == 0
    found = capsys.readouterr()
    assert found.err == ""
    return found.out


def wrong(text: str, tmp_path, capsys, module=finetune_1k) -> list[str]:
    """The lines of the message about a file of that text, its name left out."""
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        parsed(["--recipe", str(path)], module)
    assert exit_info.value.code == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith(f"error: {path} ")
    return found.err.removeprefix(f"error: {path} ").splitlines()


@pytest.mark.parametrize(
    ("module", "form"), [(pretrain_21k, []), (finetune_1k, ["--debug"]), (chain, ["--debug"]), (demo, [])]
)
def test_what_is_printed_is_read_back(module, form, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(printed(form, capsys, module))
    assert parsed(["--recipe", str(path)], module) == parsed(form, module)
    assert printed(["--recipe", str(path)], capsys, module).count("\n") == path.read_text().count("\n")


def test_every_text_and_number_is_read_back(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    fields = ("run-dir", "wandb", "data.path", "data.train", "data.val", "data.cache", "model.start", "optimizer.name")
    for texts in (TRICKY[: len(fields)], TRICKY[len(fields) :]):
        options = [f"--{field}={text}" for field, text in zip(fields, texts, strict=False)]
        options += ["--schedule.lr", f"{1 / 3}", "--schedule.min-lr", f"{1e-9 / 3}", "--runtime.spike", "inf"]
        options += ["--model.memory-encoder-depths", "3", "1", "--augment.no-mixup"]
        path.write_text(printed(options, capsys))
        assert parsed(["--recipe", str(path)]) == parsed(options)


def test_each_source_overrides_the_one_before(tmp_path, capsys):
    path = tmp_path / "some.yaml"
    path.write_text(
        "data: {path: from-file, train: from-file}\nschedule.lr: 1e-4\nruntime:\n  log-every: 3 steps\n  compile: off"
    )
    options = ["--debug", "--recipe", str(path), "--data.train", "from-line"]
    recipe = parsed(options)
    debug = finetune_1k.make("vittm_base", True)
    assert (recipe.data.path, recipe.data.train, recipe.schedule.lr) == ("from-file", "from-line", 1e-4)
    assert (recipe.runtime.log_every, recipe.runtime.compile) == ("3 steps", "off")
    assert recipe.data.global_batch == debug.data.global_batch
    told = sources(recipe)
    names = ("seed", "loss", "data.global_batch", "data.path", "data.train", "schedule.lr")
    file = f"file {path}"
    assert [told[name] for name in names] == ["default", "recipe", "--debug", file, "command line", file]
    comments = dict(re.findall(r"^(\S+): [^#\n]*?(?:  # (.*))?$", printed(options, capsys), re.MULTILINE))
    assert comments == {name: "" if source == "default" else source for name, source in told.items()}


def test_a_chain_takes_the_fields_of_its_stages(tmp_path):
    path = tmp_path / "chain.json"
    path.write_text(json.dumps({"run_dir": "there", "pretrain": {"seed": 3}, "finetune.data.path": "digits"}))
    both = parsed(["--recipe", str(path), "--finetune.seed", "4"], chain)
    assert (both.run_dir, both.pretrain.seed, both.finetune.seed) == ("there", 3, 4)
    assert both.finetune.data.path == "digits"
    assert sources(both.pretrain)["seed"] == f"file {path}"
    assert sources(both.finetune)["seed"] == "command line"


def test_everything_wrong_in_a_file_is_listed_together(tmp_path, capsys):
    text = """\
data:
  globl-batch: 8
  workers: many
  workers: 4
seed: null
loss: mse
optimizer: adamw
augment.crop_scale: 0.5
augment.crop_ratio: [1, 2, 3]
augment.mixup: 2
data.path: [a, b]
model.memory_encoder_depths: [3, x]
pretrain.data.path: 3
wandb: null
model.start:
"""
    assert wrong(text, tmp_path, capsys) == [
        "is no file of this recipe:",
        "  - line 2: data.globl_batch is no field; the nearest is data.global_batch",
        "  - line 3: data.workers 'many': it takes a whole number",
        "  - line 4: data.workers is given a second time, first in line 3: leave one out",
        "  - line 5: seed 'null': it takes a whole number",
        "  - line 6: loss 'mse': it takes one of ce, bce",
        "  - line 7: optimizer is a section: give its fields, as optimizer.name",
        "  - line 8: augment.crop_scale '0.5': it takes a list: [a number, a number]",
        "  - line 9: augment.crop_ratio ['1', '2', '3']: it takes a list: [a number, a number]",
        "  - line 10: augment.mixup '2': it takes true or false",
        "  - line 11: data.path ['a', 'b']: it takes text",
        "  - line 12: model.memory_encoder_depths ['3', 'x']: it takes a list, each a whole number, or null",
        "  - line 13: pretrain.data.path is no field; the nearest is data.path",
        "  - line 14: wandb 'null': it takes text",
        "  - line 15: model.start '': it takes text",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no fields of a recipe: give some as 'data.path: DIRECTORY', each on its line"),
        ("- a\n", "holds no fields of a recipe: give some as 'data.path: DIRECTORY', each on its line"),
        (
            "data: &a {path: *a}",
            "cannot be read as a recipe (it nests without end, as by an alias within what it stands for): give YAML or "
            "JSON as --print prints it, or a run's recipe.json",
        ),
        ("{seed: 3", "cannot be read as a recipe (while parsing a flow mapping"),
    ],
)
def test_what_is_no_recipe(text, message, tmp_path, capsys):
    assert wrong(text, tmp_path, capsys)[0] == message


def test_a_file_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parsed(["--recipe", "nosuch.yaml"])
    assert exit_info.value.code == 2
    assert "nosuch.yaml cannot be read as a recipe ([Errno 2] No such file" in capsys.readouterr().err


def check_attempts(root, data: str) -> None:
    """What a run leaves of the software, the machine and the data it ran on."""
    (first,), (again,) = (
        [json.loads(line) for line in (root / run / "attempts.jsonl").read_text().splitlines()]
        for run in ("first", "again")
    )
    assert list(first) == [
        *("started", "step", "commit", "versions", "host", "hardware", "world", "strategy", "index"),
    ]
    assert {**first, "started": 0} == {**again, "started": 0}
    assert (first["commit"], first["host"]) == (code_version(), socket.gethostname())
    assert (first["step"], first["world"], first["strategy"]) == (0, 1, "ddp")
    assert re.fullmatch(r"\d+ cores of .+", first["hardware"])
    index = Index.load(Path(data))
    prints = {"fingerprint": index.fingerprint("train"), "val_fingerprint": index.fingerprint("val")}
    assert first["index"] == {"path": data, **prints}
    assert first["versions"].items() >= {"python": platform.python_version(), "torch": version("torch")}.items()
    assert first["versions"].keys() >= {"timm", "accelerate", "deepspeed", "numpy"}


def test_a_recipe_that_is_printed_and_run_again_has_the_same_losses(start, small, tmp_path):
    """Printed on both ranks of a launch, of which one prints; run on one rank."""
    options = ["--debug", *small, "--seed", "5", "--schedule.lr", "3e-3", "--schedule.length", "64 images"]
    text = start(FINETUNE, [*options, "--run-dir", str(tmp_path / "again"), "--print"], 2).wait()
    assert (text.codes, text.outputs[1]) == ([0, 0], "")
    assert not (tmp_path / "again").exists()
    (tmp_path / "recipe.yaml").write_text(text.outputs[0])
    first = start(FINETUNE, [*options, "--run-dir", str(tmp_path / "first")])
    again = start(FINETUNE, ["--recipe", str(tmp_path / "recipe.yaml")])
    assert (first.wait().codes, again.wait().codes) == ([0], [0])
    losses = [line["loss"] for line in ranks.metrics(tmp_path / "first") if "loss" in line]
    assert len(losses) == 4
    assert ranks.metrics(tmp_path / "again") == ranks.metrics(tmp_path / "first")
    check_attempts(tmp_path, small[1])
    kept = tmp_path / "first" / "recipe.json"
    assert flatten(parsed(["--recipe", str(kept)])) == json.loads(kept.read_text())
