"""pipeline.predict and tools/predict.py: answers and features of runs, exports and timm's weights; what is refused."""

import io
import json
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config

from pipeline.augment.device import normalise
from pipeline.augment.exact import EvalTransform
from pipeline.models.build import make_model
from pipeline.predict import features, load_checkpoint, load_run, predict
from pipeline.recipe import Augment, Model, Recipe
from pipeline.record import CLASSES, keep_classes, keep_recipe, weights_path
from shards.errors import UserError
from tools import export
from tools.predict import main

OPTIONS = {"memory_ps": 8, "process_ps": 16, "embed_dim": 24, "depth": 1, "num_heads": 3}
RECIPE = Recipe(augment=Augment(image_size=32), model=Model(name="vittm_tiny", **OPTIONS), ema_decay=0.0)
CLASS_NAMES = ["n01440764", "n01443537", "n01484850", "n01491361"]
TIMM = "test_vit"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A finished run of four classes whose answers depend on the image."""
    root = tmp_path_factory.mktemp("run")
    keep_recipe(root, RECIPE)
    keep_classes(root, CLASS_NAMES)
    model = make_model(RECIPE, 4)
    torch.nn.init.normal_(model.get_classifier()[0].weight)
    weights_path(root, "model").parent.mkdir()
    save_file(model.state_dict(), weights_path(root, "model"))
    return root


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory) -> Path:
    """Weights of a small model of timm's with 7 classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "weights.safetensors"
    save_file(timm.create_model(TIMM, num_classes=7).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """photos/a.jpg, photos/inner/b.png, and photos/c, a JPEG without a suffix; with notes and a hidden file."""
    root = tmp_path_factory.mktemp("photos")
    (root / "inner").mkdir()
    rng = np.random.default_rng(0)
    for name, kind in (("a.jpg", "JPEG"), ("inner/b.png", "PNG"), ("c", "JPEG"), (".hidden.jpg", "JPEG")):
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(root / name, kind)
    (root / "notes.txt").write_text("no image")
    return root


def error_of(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as raised:
        call(*arguments, **options)
    return str(raised.value)


def answers_of(capsys, *arguments) -> list[dict]:
    assert main([str(argument) for argument in (*arguments, "--json")]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# --- answers


def test_an_answer_is_the_softmax_of_the_memory_head(run_dir, photos):
    answer = predict(run_dir, photos / "a.jpg")
    pixels = torch.from_numpy(EvalTransform(32)((photos / "a.jpg").read_bytes()).copy()).permute(2, 0, 1)
    with torch.no_grad():
        scores = load_run(run_dir).model(normalise(pixels[None]))[0].softmax(dim=0)
    label = int(scores.argmax())
    assert answer == {"pred_class": CLASS_NAMES[label], "pred_label": label, "pred_score": scores[label].item()}


def test_what_an_image_may_be_and_what_a_checkpoint_may_be(run_dir, photos):
    path = photos / "inner" / "b.png"
    expected, loaded = predict(run_dir, path, top_k=9), load_checkpoint(run_dir / "weights" / "model.safetensors")
    assert predict(loaded, str(path), top_k=9) == expected
    assert predict(loaded, path.read_bytes(), top_k=9) == expected
    assert predict(loaded, Image.open(path).convert("RGBA"), top_k=9) == expected
    scores = [found["pred_score"] for found in expected["top"]]
    assert len(scores) == 4
    assert sum(scores) == pytest.approx(1)
    assert scores == sorted(scores, reverse=True)
    assert expected["top"][0] == {name: value for name, value in expected.items() if name != "top"}


def test_a_run_without_names_says_numbers(run_dir, tmp_path, photos):
    (tmp_path / "weights").mkdir()
    for name in ("recipe.json", "weights/model.safetensors"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    answer = predict(tmp_path, photos / "a.jpg")
    assert answer["pred_class"] == str(answer["pred_label"])
    named = load_checkpoint(tmp_path, classes=["a", "b", "c", "d"])
    assert predict(named, photos / "a.jpg")["pred_class"] == "abcd"[answer["pred_label"]]


def test_an_export_answers_as_the_run(run_dir, photos, tmp_path, capsys):
    assert export.main([str(run_dir), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == CLASS_NAMES
    capsys.readouterr()
    for name in ("a.jpg", "inner/b.png"):
        for exported in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
            assert predict(exported, photos / name, top_k=4) == predict(run_dir, photos / name, top_k=4)


@torch.no_grad()
def test_timms_models_see_images_as_timm_shows_them(timm_file, photos):
    asked = load_checkpoint(timm_file, TIMM)
    transform = create_transform(**resolve_model_data_config(asked.model))
    images = [Image.open(photos / name).convert("RGB") for name in ("a.jpg", "inner/b.png")]
    expected = asked.model(torch.stack([transform(image) for image in images])).softmax(dim=1)
    for image, scores in zip(images, expected, strict=True):
        answer = predict(asked, image, top_k=7)
        assert [scores[found["pred_label"]].item() for found in answer["top"]] == pytest.approx(
            [found["pred_score"] for found in answer["top"]], rel=1e-5
        )
    pixels = torch.from_numpy(asked.view.transform.pixels(images[0])).permute(2, 0, 1)
    assert torch.equal(asked.view.normalise(pixels[None])[0], transform(images[0]))


def test_timms_pretrained_weights_by_name(photos, tmp_path, monkeypatch):
    name = "test_vit.r160_in1k"
    cached = tmp_path / f"models--timm--{name}"
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    model = timm.create_model(TIMM)
    torch.nn.init.constant_(model.head.bias[3], 99)
    save_file(model.state_dict(), cached / "snapshots" / ("0" * 40) / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    answer = predict(f"timm:{name}", photos / "a.jpg")
    assert answer == {"pred_class": "n01491361", "pred_label": 3, "pred_score": pytest.approx(1)}
    told = error_of(load_checkpoint, "timm:vit_tiny_patch16_224")
    assert told.startswith("timm:vit_tiny_patch16_224: model.safetensors of timm/vit_tiny_patch16_224.augreg_in21k_ft_")
    assert told.endswith("give the path of a safetensors file of its weights, and --model")


# --- features


def test_features_are_what_the_classifiers_see(run_dir, timm_file, photos):
    asked = load_checkpoint(run_dir)
    found = features(asked, [photos / "a.jpg", photos / "inner" / "b.png"])
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {"memory": (2, 24), "process": (2, 24)}
    scores = asked.model.get_classifier()[0](found["memory"]).softmax(dim=1)
    answer = predict(asked, photos / "inner" / "b.png")
    assert scores[1, answer["pred_label"]].item() == pytest.approx(answer["pred_score"])
    timms = load_checkpoint(timm_file, TIMM)
    ((name, tensor),) = features(timms, [photos / "a.jpg"]).items()
    assert (name, tuple(tensor.shape)) == ("head", (1, timms.model.num_features))


def test_features_in_a_file(run_dir, photos, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    given = [str(run_dir), str(photos / "a.jpg"), str(tmp_path / "broken.jpg"), str(photos / "c"), "--batch", "2"]
    expected, kept = features(run_dir, [photos / "a.jpg", photos / "c"]), [str(photos / "a.jpg"), str(photos / "c")]
    for name in ("f.npz", "f.safetensors"):
        assert main([*given, "--features", str(tmp_path / name)]) == 1
        told = capsys.readouterr()
        assert told.out == f"{tmp_path / name}: features of 2 images: 24 of head memory, 24 of head process\n"
        assert "1 of 3 images could not be read" in told.err
    arrays, tensors = np.load(tmp_path / "f.npz"), load_file(tmp_path / "f.safetensors")
    assert list(arrays["images"]) == kept
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert json.loads(file.metadata()["images"]) == kept
    for head in ("memory", "process"):
        torch.testing.assert_close(tensors[head], expected[head])
        np.testing.assert_array_equal(arrays[head], tensors[head].numpy())


# --- the command


def test_folders_files_and_standard_input(run_dir, photos, capsys, monkeypatch):
    inside = [str(photos / name) for name in ("a.jpg", "c", "inner/b.png")]
    expected = [{"image": path} | predict(run_dir, path) for path in inside]
    found = answers_of(capsys, run_dir, photos)
    assert [line["image"] for line in found] == inside
    for line, answer in zip(found, expected, strict=True):
        assert line == answer | {"pred_score": pytest.approx(answer["pred_score"], rel=1e-5)}
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{inside[2]}\n\n{inside[0]}\r\n"))
    assert [line["image"] for line in answers_of(capsys, run_dir, "-", inside[1])] == [inside[2], inside[0], inside[1]]
    with_workers = answers_of(capsys, run_dir, photos, "--workers", "1", "--batch", "2", "--top-k", "2")
    assert [line["top"][0]["pred_class"] for line in with_workers] == [line["pred_class"] for line in found]


def test_a_table_for_people(run_dir, photos, capsys):
    answer = predict(run_dir, photos / "a.jpg", top_k=2)
    assert main([str(run_dir), str(photos / "a.jpg"), "--top-k", "2"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    words = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus"}
    words |= {"n01484850": "great white shark, white shark", "n01491361": "tiger shark, Galeocerdo cuvieri"}
    assert first.startswith(f"{answer['pred_score']:7.2%}  {answer['pred_class']} {words[answer['pred_class']][:20]}")
    assert first.endswith(str(photos / "a.jpg"))
    assert second.startswith(f"{answer['top'][1]['pred_score']:7.2%}  {answer['top'][1]['pred_class']} ")


def test_images_that_cannot_be_read_are_named_and_the_others_done(run_dir, photos, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("no image")
    paths = [str(tmp_path / "gone.jpg"), str(photos / "a.jpg"), str(tmp_path / "text.jpg")]
    assert main([str(run_dir), *paths, "--json"]) == 1
    told = capsys.readouterr()
    gone, good, text = [json.loads(line) for line in told.out.splitlines()]
    assert gone == {"image": paths[0], "error": "No such file or directory"}
    assert good["image"] == paths[1]
    assert text["error"] == "cannot decode an image from 8 bytes: Pillow knows no such format"
    assert told.err.splitlines() == [
        f"{paths[0]}: cannot be read: No such file or directory",
        f"{paths[2]}: cannot be read: cannot decode an image from 8 bytes: Pillow knows no such format",
        "2 of 3 images could not be read",
    ]
    assert main([str(run_dir), *paths]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 1


# --- what is refused


def refused(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    return told.err.removeprefix("error: ").rstrip("\n")


def test_checkpoints_that_are_none(run_dir, timm_file, photos, tmp_path, capsys):
    image = photos / "a.jpg"
    assert refused(capsys, tmp_path / "gone", image).startswith(f"{tmp_path}/gone: no such file or directory; give a")
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    for options in ([], ["--model", TIMM]):
        told = refused(capsys, tmp_path / "weights.pth", image, *options)
        assert (
            "other formats may run code when opened, so none is read: write the weights anew with safetensors" in told
        )
    assert refused(capsys, timm_file, image) == (
        f"{timm_file} does not say which model it is of: it lies in no run (recipe.json above it) and in no exported "
        "directory (config.json beside it); give the name of timm's model as --model"
    )
    assert f"{timm_file} is a checkpoint of another model: " in refused(capsys, timm_file, image, "--model", "resnet18")
    told = refused(capsys, timm_file, image, "--model", "test_vitt")
    assert told.startswith(
        "--model test_vitt: there is no such model in timm's registry; the nearest names there are ["
    )
    assert refused(capsys, run_dir, image, "--model", TIMM) == (
        f"--model {TIMM}: {run_dir} is no file; the option is for a file of weights of timm's model"
    )
    (tmp_path / "step-00000008").mkdir()
    told = refused(capsys, tmp_path / "step-00000008", image)
    assert told.startswith(f"{tmp_path}/step-00000008 is no checkpoint that is whole (not committed: ")
    assert "timm:nosuch: there is no such model in timm's registry" in refused(capsys, "timm:nosuch", image)
    assert "Invalid pretrained tag (no) for resnet18" in refused(capsys, "timm:resnet18.no", image)
    assert "timm has no model.safetensors of it" in refused(capsys, "timm:vittm_tiny", image)


def test_directories_that_are_not_whole(tmp_path, photos, capsys):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    told = refused(capsys, tmp_path, photos)
    assert told.startswith(f"{tmp_path} has no model.safetensors; other files of weights may run code when opened")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert refused(capsys, tmp_path, photos).startswith(f"{tmp_path}/config.json builds no model (JSONDecodeError: ")
    (tmp_path / "config.json").write_text('{"architecture": "nosuch", "pretrained_cfg": {}}')
    assert "builds no model (RuntimeError: Unknown model (nosuch))" in refused(capsys, tmp_path, photos)


def test_names_that_are_not_those_of_the_classes(run_dir, photos, tmp_path, capsys):
    (tmp_path / "three").write_text("a\nb\nc\n")
    assert refused(capsys, run_dir, photos, "--classes", tmp_path / "three") == (
        f"{run_dir}/weights/model.safetensors has 4 classes, but --classes names 3: give the list that it was trained "
        "with as --classes"
    )
    (tmp_path / "weights").mkdir()
    for name in ("recipe.json", "weights/model.safetensors"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    for text, told in (
        ("[", "is not the JSON that a run writes ("),
        ("[1]", "is no list of names, as a run writes it: restore it from a copy, or remove it"),
        ('["a"]', "has 4 classes, but the run's classes.json names 1: give the list"),
    ):
        (tmp_path / CLASSES).write_text(text)
        assert told in refused(capsys, tmp_path, photos)


def test_images_that_are_none(run_dir, photos, tmp_path, capsys, monkeypatch):
    assert refused(capsys, run_dir, photos, tmp_path) == (
        f"{tmp_path} holds no images (JPEG, PNG or WebP), nor do the folders in it: give another one"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert refused(capsys, run_dir, "-") == (
        "there are no images to look at: give files, folders, or - for paths on standard input"
    )
    assert error_of(predict, run_dir, photos / "gone") == (
        f"{photos}/gone cannot be read: No such file or directory; give a JPEG, PNG or WebP"
    )
    assert error_of(predict, run_dir, b"").startswith("the image cannot be read: cannot decode an image from 0 bytes")


def test_options_that_cannot_be(run_dir, photos, tmp_path, capsys):
    for option, told in (("--top-k", "1 or more"), ("--batch", "1 or more")):
        assert refused(capsys, run_dir, photos, option, "0") == f"{option} 0: it must be {told}"
    assert refused(capsys, run_dir, photos, "--features", tmp_path / "f.pt") == (
        f"--features {tmp_path}/f.pt: features are written as .npz or .safetensors; give a name that ends so"
    )
    assert refused(capsys, run_dir, photos, "--features", tmp_path / "no" / "f.npz") == (
        f"--features {tmp_path}/no/f.npz: there is no directory {tmp_path}/no; make it, or give another one"
    )
    assert main([str(run_dir), str(photos / "notes.txt"), "--features", str(tmp_path / "f.npz")]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"error: --features {tmp_path}/f.npz: none of the 1 images could be read; nothing was written"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none(run_dir, photos, capsys):
    assert refused(capsys, run_dir, photos, "--device", "cuda").startswith("--device cuda: torch sees no CUDA device")
