"""tools/evaluate.py: the trainer's own figures of a finished run, on shards and class folders, any world; ReaL."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import ranks
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.predict import Checkpoint, load_checkpoint, predict
from pipeline.predict.evaluation import Scores, Settings, evaluate, open_images
from pipeline.predict.find import load_variants
from shards.classes import load_classes
from shards.engine import open_engine
from shards.errors import UserError
from shards.sources.folders import ClassFolders
from shards.store import StoreOptions
from shards.writing.options import WriteOptions
from shards.writing.writer import write
from tools import make_shards

TOOL = "tools/evaluate.py"
TIMM = "test_vit"
PER_CLASS = [5, 5, 5, 4, 4]  # of `shards`' split val
ANSWER = 10  # what `constant` makes of every image


@pytest.fixture(scope="module")
def constant(tmp_path_factory):
    """constant(num_classes) -> weights of a model of timm's that answers ANSWER, whatever it sees, and then those after
    it."""

    def make(num_classes: int) -> Path:
        path = tmp_path_factory.mktemp("timm") / "weights.safetensors"
        weights = timm.create_model(TIMM, num_classes=num_classes).state_dict()
        order = (torch.arange(num_classes) - ANSWER) % num_classes
        save_file(weights | {"head.weight": weights["head.weight"] * 0, "head.bias": -order.float()}, path)
        return path

    return make


def folders(root: Path, images: dict[str, list[str]]) -> Path:
    """Class folders of small images: class -> names of files."""
    for name, files in images.items():
        (root / name).mkdir(parents=True)
        for file in files:
            Image.new("RGB", (20, 20)).save(root / name / file, "JPEG")
    return root


def scores_of(variants, data, world, split="", real=None) -> Scores:
    variants = variants if isinstance(variants, dict) else {"": variants}
    asked = next(iter(variants.values()))
    images = open_images(str(data), split, asked, StoreOptions())
    found = evaluate(variants, images, Settings(8, 0, real=real), world)
    assert found is not None
    return found


def last_evaluation(run: Path) -> dict:
    return evaluation_of(run, 8)


def evaluation_of(run: Path, step: int) -> dict:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (line,) = [line for line in lines if "split" in line and line["step"] == step]
    return {name: value for name, value in line.items() if name.endswith(("_top1", "_top5", "_loss", "unreadable"))}


# --- a finished run


def test_the_figures_are_those_of_the_trainer(finished, shards, alone):
    variants = load_variants(finished / "finetune")
    assert list(variants) == ["", "ema_"]
    asked = variants[""]
    images = open_images(str(shards), "", asked, StoreOptions())
    found = evaluate(variants, images, Settings.of(asked.recipe, 0), alone)
    assert found.values == last_evaluation(finished / "finetune")  # bit by bit
    assert (found.num_samples, found.classes, found.matched, found.bad) == (sum(PER_CLASS), 5, "name", [])
    answer = predict(asked, Image.new("RGB", (20, 20)))
    assert answer["pred_class"] in asked.classes, "the model still answers as it did"
    single = scores_of(load_variants(finished / "finetune" / "weights" / "ema.safetensors"), shards, alone).values
    assert {f"ema_{name}" for name in single} - {"ema_unreadable"} < set(found.values)
    assert all(value == found.values[f"ema_{name}"] for name, value in single.items() if name != "unreadable")


def test_class_folders_score_as_their_shards(finished, shards, alone):
    variants = load_variants(finished / "finetune")
    expected, found = (scores_of(variants, data, alone).values for data in (shards, shards.parent / "val"))
    assert {name: value for name, value in found.items() if "loss" not in name} == {
        name: value for name, value in expected.items() if "loss" not in name
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_two_ranks_count_as_one_does(finished, shards, tmp_path):
    command = [str(finished / "finetune"), str(shards), "--json", "--workers", "0"]
    single, double = (ranks.run_script(TOOL, command, tmp_path / "logs", size).wait() for size in (1, 2))
    assert (single.codes, double.codes) == ([0], [0, 0]), single.outputs + double.outputs
    one, two = (json.loads(ended.outputs[0].splitlines()[-1]) for ended in (single, double))
    assert "{" not in double.outputs[1], "rank 0 alone reports"
    figures = [name for name in one if name.endswith(("_top1", "_top5"))]
    assert len(figures) == 8
    assert all(two[name] == one[name] for name in figures)
    losses = [name for name in one if name.endswith("_loss")]
    assert [two[name] for name in losses] == pytest.approx([one[name] for name in losses], rel=1e-6)
    assert two | {name: one[name] for name in losses} == one
    assert {name: one[name] for name in ("samples", "classes", "checkpoint_classes", "matched_by")} == {
        "samples": 23, "classes": 5, "checkpoint_classes": 5, "matched_by": "name",
    }  # fmt: skip
    assert {name: value for name, value in one.items() if name in figures} == {
        name: value for name, value in last_evaluation(finished / "finetune").items() if name in figures
    }


def test_a_table_for_people(finished, shards, tmp_path):
    options = [str(finished / "pretrain"), str(shards.parent / "val"), "--workers", "0"]
    ended = ranks.run_script(TOOL, options, tmp_path / "logs").wait()
    assert ended.codes == [0], ended.outputs
    lines, expected = ended.outputs[0].splitlines(), last_evaluation(finished / "pretrain")
    assert f"weights: {finished}/pretrain/weights/model.safetensors" in lines
    assert f"ema: {finished}/pretrain/weights/ema.safetensors" in lines
    assert f"data: the class folders in {shards.parent}/val: 23 images, 0 of them unreadable" in lines
    assert "classes: all the checkpoint's 5, which the run's classes.json names, matched by name" in lines
    row = next(line.split() for line in lines if line.startswith("ema process"))
    top1, top5 = (f"{expected[f'ema_process_{name}']:.2%}" for name in ("top1", "top5"))
    assert row == ["ema", "process", top1, top5, f"{expected['ema_process_loss']:.4f}"]


# --- classes


def test_numeric_folders_are_labels_whatever_their_order_as_text(constant, alone, tmp_path):
    data = folders(
        tmp_path / "v2", {"0": ["a.jpg"], "2": ["a.jpg"], "10": ["a.jpg", "b.jpeg", "c.jpg"], "11": ["a.jpg"]}
    )
    found = scores_of(load_checkpoint(constant(12), TIMM), data, alone)
    assert (found.num_samples, found.classes, found.matched) == (6, 4, "number")
    assert found.values["head_top1"] == 3 / 6  # 10 is answered; then 11, 0, 1, 2
    assert found.values["head_top5"] == 1


def test_a_subset_of_the_classes_in_another_order(constant, shards, alone):
    names = [f"c{label}" for label in (4, 0, 3)] + [f"x{label}" for label in range(7)] + ["c1", "c2"]
    found = scores_of(load_checkpoint(constant(12), TIMM, names), shards, alone, split="val")
    assert (found.classes, found.matched) == (5, "name")
    assert found.values["head_top1"] == PER_CLASS[1] / 23
    assert found.values["head_top5"] == 1  # c1, c2, c4, c0, c3


def test_an_unreadable_image_counts_as_wrong(constant, alone, tmp_path):
    data = folders(tmp_path, {"10": ["a.jpg", "b.jpg"], "3": ["a.jpg"]})
    (data / "10" / "b.jpg").write_bytes(b"no image")
    found = scores_of(load_checkpoint(constant(11), TIMM), data, alone)
    assert (found.values["head_top1"], found.values["unreadable"]) == (1 / 3, 1)
    assert [(error.key, error.reason.split(":")[0]) for error in found.bad] == [
        (str(data / "10" / "b.jpg"), "cannot decode an image from 8 bytes")
    ]


def error_of(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as raised:
        call(*arguments, **options)
    return str(raised.value)


def test_classes_that_are_not_the_checkpoints(constant, shards, alone, tmp_path):
    asked = load_checkpoint(constant(12), TIMM)
    give = "give the names of its classes, in order of its labels, as --classes (1k, 21k-p or a text file)"
    assert error_of(scores_of, asked, shards, alone) == (
        f"{asked.name} does not say what its 12 classes are called, and split 'val' of {shards} has names: 'c0', 'c1', "
        f"'c2', 'c3', 'c4'; {give}"
    )
    mixed = folders(tmp_path / "mixed", {"0": ["a.jpg"], "cat": ["a.jpg"]})
    assert f"and the class folders in {mixed} has names: 'cat'; " in error_of(scores_of, asked, mixed, alone)
    beyond = folders(tmp_path / "beyond", {"0": ["a.jpg"], "12": ["a.jpg"]})
    assert error_of(scores_of, asked, beyond, alone) == (
        f"the class folders in {beyond} has classes that are numbers, which count the labels of {asked.name} from 0 to "
        "11, and 1 are beyond: '12'; give data of the same classes"
    )
    twice = folders(tmp_path / "twice", {"1": ["a.jpg"], "01": ["a.jpg"]})
    assert "has numbers for classes twice: '01', '1'; put their images" in error_of(scores_of, asked, twice, alone)
    named = load_checkpoint(constant(12), TIMM, [f"c{label}" for label in range(3)] + [f"x{n}" for n in range(9)])
    told = error_of(scores_of, named, shards, alone)
    assert told.startswith(
        f"split 'val' of {shards} has 2 classes of 5 that {named.name} does not have: 'c3', 'c4'. It has 12: 'c0', "
    )
    same = load_checkpoint(constant(12), TIMM, ["c0", "c0", "c1", "c2", "c3", "c4", *"abcdef"])
    assert f"{same.name} has several classes of the same name: 'c0'; {give}" == error_of(scores_of, same, shards, alone)


def test_data_that_is_none(constant, shards, alone, tmp_path):
    asked = load_checkpoint(constant(12), TIMM)
    assert f"the data directory {tmp_path}/gone does not exist" in error_of(scores_of, asked, tmp_path / "gone", alone)
    assert "holds no class folders; the layout is PATH/<class>/<image>.jpg" in error_of(
        scores_of, asked, tmp_path, alone
    )
    data = folders(tmp_path / "data", {"1": ["a.jpg"], "2": []})
    assert "has no images (.jpg, .png, ...); add some or remove" in error_of(scores_of, asked, data, alone)
    (data / "2" / "b.jpg").symlink_to("nowhere")
    assert error_of(scores_of, asked, data, alone) == (
        f"1 files in {data} are images by their names, but '{data}/2/b.jpg' is a broken link (No such file or "
        "directory): mend or remove what is no file"
    )
    assert error_of(scores_of, asked, shards.parent / "val", alone, split="val") == (
        f"--split val: {shards.parent}/val has no index.json, so it is taken for class folders, which have no splits: "
        "give the directory that holds the folders, and no --split"
    )
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "val-000000.tar").touch()
    assert error_of(scores_of, asked, tmp_path / "tars", alone).startswith(
        f"{tmp_path}/tars has no index.json: its shards are missing or unfinished; write them: "
    )
    assert "has no index.json, so it is taken for class folders" in error_of(
        scores_of, asked, folders(tmp_path / "tars", {"1": ["a.jpg"]}), alone, split="val"
    )
    assert "no split 'test' in" in error_of(scores_of, asked, shards, alone, split="test")


# --- ReaL


@pytest.fixture(scope="module")
def validation(tmp_path_factory) -> Path:
    """Six images of ImageNet-1k's validation split by their names, as class folders, and as shards beside them."""
    root, classes = tmp_path_factory.mktemp("imagenet"), load_classes("1k")
    name = "ILSVRC2012_val_{:08d}.JPEG".format
    images = {
        classes[ANSWER]: [name(1), name(2)],
        classes[3]: [name(50_000), name(4)],
        classes[999]: [name(7), name(9)],
    }
    source = ClassFolders(str(folders(root / "folders", images)), "val")
    with open_engine("local", 1) as engine:
        write(source, root / "shards", WriteOptions(shard_size="4"), engine)
    return root


def real_json(path: Path, labels: dict[int, list[int]]) -> Path:
    path.write_text(json.dumps([labels.get(number, []) for number in range(1, 50_001)]))
    return path


def test_real(constant, validation, alone, tmp_path):
    labels = {1: [ANSWER], 2: [5, 6], 4: [999, ANSWER], 50_000: [3], 7: [ANSWER]}  # 9 has none
    real = real_json(tmp_path / "real.json", labels)
    asked = load_checkpoint(constant(1000), TIMM)
    assert asked.named == "timm's imagenet-1k"
    for data in ("folders", "shards"):
        found = scores_of(asked, validation / data, alone, real=real)
        assert (found.values["head_real_top1"], found.values["head_top1"]) == (3 / 5, 2 / 6)
        assert (found.real.num_samples, found.real.num_left_out) == (5, 1)
    turned = load_checkpoint(constant(1000), TIMM, load_classes("1k")[::-1])  # it answers class 989
    assert scores_of(turned, validation / "shards", alone, real=real).values["head_real_top1"] == 0
    real = real_json(tmp_path / "turned.json", labels | {9: [999 - ANSWER]})
    assert scores_of(turned, validation / "shards", alone, real=real).values["head_real_top1"] == 1 / 6


def test_real_finds_the_name_in_the_json_of_shards_that_others_wrote(constant, validation, alone, tmp_path):
    image = next(validation.glob("folders/*/ILSVRC2012_val_00000001.JPEG")).read_bytes()
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "val-000000.tar", "w") as tar:
        for number in (1, 2):
            meta = json.dumps({"filename": f"val/ILSVRC2012_val_{number:08d}.JPEG"}).encode()
            for field, data in (("jpg", image), ("cls", b"3"), ("json", meta)):
                member = tarfile.TarInfo(f"{number:06d}.{field}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert make_shards.main(["index", str(tmp_path / "data"), "--classes", "1k", "--workers", "1"]) == 0
    real = real_json(tmp_path / "real.json", {1: [ANSWER], 2: [3]})
    found = scores_of(load_checkpoint(constant(1000), TIMM), tmp_path / "data", alone, real=real)
    assert (found.values["head_real_top1"], found.values["head_top1"]) == (1 / 2, 0)


def test_real_counts_an_unreadable_image_as_wrong(constant, validation, alone, tmp_path):
    data = shutil.copytree(validation / "folders", tmp_path / "data")
    (next(data.glob("*/ILSVRC2012_val_00000001.JPEG"))).write_bytes(b"")
    real = real_json(tmp_path / "real.json", {1: [ANSWER], 2: [ANSWER]})
    assert scores_of(load_checkpoint(constant(1000), TIMM), data, alone, real=real).values["head_real_top1"] == 1 / 2


def test_real_on_more_ranks_than_images(constant, tmp_path):
    name = load_classes("1k")[ANSWER]
    data = folders(tmp_path / "data", {name: ["ILSVRC2012_val_00000007.JPEG"]})
    real = real_json(tmp_path / "real.json", {7: [ANSWER]})
    command = [str(constant(1000)), str(data), "--model", TIMM, "--real", str(real), "--json", "--workers", "0"]
    ended = ranks.run_script(TOOL, command, tmp_path / "logs", 2).wait()
    assert ended.codes == [0, 0], ended.outputs
    found = json.loads(ended.outputs[0].splitlines()[-1])
    assert (found["head_real_top1"], found["real_images"], found["real_left_out"], found["samples"]) == (1, 1, 0, 1)


def test_real_that_is_not_real(constant, validation, shards, alone, tmp_path):
    asked, path = load_checkpoint(constant(1000), TIMM), tmp_path / "real.json"

    def told(data=validation / "shards", asked: Checkpoint = asked) -> str:
        return error_of(scores_of, asked, data, alone, real=path)

    assert told() == f"--real {path}: no such file; real.json is in github.com/google-research/reassessed-imagenet"
    path.write_text("[")
    assert told().startswith(f"--real {path} is no JSON (")
    for text, found in (("[[1]]", "a list of 1"), ("{}", "a dict")):
        path.write_text(text)
        assert told().startswith(
            f"--real {path} is {found}, and ReaL's is a list of 50000: one an image of ImageNet-1k"
        )
    for labels in ([1000], [True], "1"):
        real_json(path, {2: labels})
        assert told() == (
            f"--real {path}: item 2 is {json.dumps(labels)}, and ReaL's are lists of labels from 0 to 999; give that "
            "file"
        )
    real_json(path, {3: [3]})
    assert told() == f"--real {path}: it has no label for any of the 6 images; leave it out"
    few = load_checkpoint(constant(12), TIMM, [f"c{label}" for label in range(12)])
    assert told(shards, few).startswith(
        f"ImageNet-1k, which --real is of, has 1000 classes of 1000 that {few.name} does not have: 'n01440764', "
    )
    data = folders(tmp_path / "data", {"0": ["ILSVRC2012_val_00050001.JPEG"]})
    assert told(data) == (
        f"--real: sample 0, '{data}/0/ILSVRC2012_val_00050001.JPEG', does not say which image of ImageNet-1k's "
        "validation split it is: keys, or the json's filename, must hold names from ILSVRC2012_val_00000001 to "
        "ILSVRC2012_val_00050000"
    )


# --- the command


def test_what_is_refused_ends_with_code_2(constant, shards, tmp_path):
    cases = [
        ([tmp_path / "gone", shards], "gone: no such file or directory; give a finished run"),
        ([constant(12), shards, "--model", TIMM], "does not say what its 12 classes are called"),
        ([constant(12), shards, "--model", TIMM, "--batch", "0"], "error: --batch 0: it must be 1 or more"),
    ]
    for arguments, told in cases:
        ended = ranks.run_script(TOOL, [str(argument) for argument in arguments], tmp_path / "logs").wait()
        assert ended.codes == [2], ended.outputs
        assert told in ended.outputs[0]
    assert not list(Path().glob("outcome.json"))


def test_arithmetic_of_a_run(finished, shards, alone):
    """The batch and the precision are the run's own, where nothing else is asked for."""
    asked = load_checkpoint(finished / "finetune")
    assert Settings.of(asked.recipe, 3) == Settings(asked.recipe.evaluation.batch, 3, asked.recipe.runtime.precision)
    images = open_images(str(shards), "", asked, StoreOptions())
    exact, pure = (evaluate({"": asked}, images, Settings(8, 0, name), alone).values for name in ("fp32", "bf16-pure"))
    assert exact != pure
    assert pure["memory_loss"] == pytest.approx(exact["memory_loss"], rel=0.05)
    assert next(asked.model.parameters()).dtype == torch.float32
    assert np.isfinite(list(pure.values())).all()
