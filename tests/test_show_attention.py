"""tools/show_attention.py: the hottest place in the PNG is where the weights are largest; layout; what it refuses."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import save_file

from pipeline.augment.device import normalise
from pipeline.models.build import make_model
from pipeline.models.vittm.attention import attention_maps
from pipeline.predict import load_run
from pipeline.recipe import Augment, Model, Recipe
from pipeline.record import keep_recipe, weights_path
from pipeline.telemetry.attention_picture import CELL, GAP, LEFT, LINE, MARGIN, Picture, Row, draw
from tools import show_attention

SIDE = 32
RESIZED = 37  # the shorter side of an image that evaluation does not resize, and of which it takes the middle 32


def prefer(model) -> None:
    """Random heads that prefer some tokens, and tokens that differ by their positions."""
    torch.manual_seed(2)
    for name, weight in model.named_parameters():
        if "_head.q" in name or "_head.k" in name or "pos_embed" in name:
            torch.nn.init.normal_(weight)


def prefer_white(model) -> None:
    """Tokens are (brightness, 1, 0, ...) throughout, and the brightest is read."""
    for name, weight in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.zeros_(weight)
        if name.endswith("embedder.proj.weight"):
            torch.nn.init.constant_(weight[0], 1 / weight[0].numel())
        if name.endswith("pos_embed"):
            torch.nn.init.ones_(weight[..., 1])
        if name.endswith("_head.k.weight"):
            torch.nn.init.constant_(weight[:, 0], 3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Callable[..., Path]:
    """finished(change, **options of the model) -> run directory; memory is 8x8 patches of 4 px, process 4x4 of 8 px."""

    def make(change=prefer, name="vittm_tiny", **options) -> Path:
        sizes = {"memory_ps": 4, "process_ps": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
        model_section = Model(name=name, **(sizes | options if name.startswith("vittm") else {}))
        recipe = Recipe(augment=Augment(image_size=SIDE), model=model_section)
        model = make_model(recipe, 5)
        with torch.no_grad():
            change(model)
        run_dir = tmp_path_factory.mktemp("run")
        keep_recipe(run_dir, recipe)
        weights_path(run_dir, "model").parent.mkdir()
        save_file(model.state_dict(), weights_path(run_dir, "model"))
        return run_dir

    return make


@pytest.fixture(scope="module")
def run_dir(finished) -> Path:
    return finished()


@pytest.fixture
def image(tmp_path) -> Path:
    return store(np.full((RESIZED, RESIZED, 3), 128, np.uint8), tmp_path / "image.png")


def store(pixels, path) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def white_square(path, row, column, side) -> Path:
    """A black image, white in one patch of what evaluation takes of it."""
    pixels = np.zeros((RESIZED, RESIZED, 3), np.uint8)
    top, left = 2 + row * side, 2 + column * side
    pixels[top : top + side, left : left + side] = 255
    return store(pixels, path)


def show(run_dir, image, output, *options) -> np.ndarray:
    """The picture, [height, width, 3]."""
    assert show_attention.main([str(part) for part in (run_dir, image, "-o", output, *options)]) == 0
    with Image.open(output) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def cell(picture, row, num_rows, column=None) -> np.ndarray:
    """A map of a picture of one band; without a column, the image beside them."""
    top = len(picture) - GAP - (num_rows - row) * (CELL + LINE + GAP)
    left = MARGIN if column is None else LEFT + column * (CELL + GAP)
    return picture[top : top + CELL, left : left + CELL]


def patches(pixels, side) -> np.ndarray:
    """Brightness of each patch at a quarter of its side, where no frame of the tests is: [side, side]."""
    quarter = (np.arange(side) * 4 + 1) * CELL // (4 * side)
    return pixels[np.ix_(quarter, quarter)] @ (0.299, 0.587, 0.114)


# --- what is hot


@pytest.mark.parametrize(
    ("options", "source_side", "asking"), [((), 8, [(0, 0), (2, 3)]), (("--write",), 4, [(0, 0), (7, 4)])]
)
def test_the_patch_that_is_read_is_the_hottest(finished, tmp_path, options, source_side, asking):
    image = white_square(tmp_path / "white.png", 2, 3, SIDE // source_side)
    places = [f"{row},{column}" for row, column in asking]
    picture = show(finished(prefer_white), image, tmp_path / "out.png", *options, "--patches", *places)
    side = CELL // source_side
    for row in range(2):
        bright = np.argwhere(cell(picture, row, 2)[side * 2 : side * 3, side * 3 : side * 4].min(axis=2) > 200)
        assert len(bright) > 0.7 * side**2  # the image has it there, too
        for block in range(2):
            hot = np.argwhere((cell(picture, row, 2, block) > (230, 230, 140)).all(axis=2))
            assert hot.min(axis=0).tolist() == [2 * side, 3 * side]
            assert hot.max(axis=0).tolist() == [3 * side - 1, 4 * side - 1]
            assert len(hot) == side**2


@pytest.mark.parametrize("head", [None, 2])
@pytest.mark.parametrize("write", [False, True])
def test_colours_are_in_the_order_of_the_weights(run_dir, image, tmp_path, head, write):
    options = [*(["--write"] if write else []), *(["--head", str(head)] if head else [])]
    picture = show(run_dir, image, tmp_path / "out.png", "--patches", "1,2", "3,0", "--blocks", "1", "0", *options)
    images = normalise(torch.full((1, 3, SIDE, SIDE), 128, dtype=torch.uint8))
    layers = attention_maps(load_run(run_dir).model, images)
    (asking_side, side) = (8, 4) if write else (4, 8)
    for row, (down, right) in enumerate([(1, 2), (3, 0)]):
        for column, block in enumerate([1, 0]):
            weights = (layers[block].write if write else layers[block].read)[0, :, down * asking_side + right]
            shares = (weights.mean(dim=0) if head is None else weights[head]).numpy()
            colours = patches(cell(picture, row, 2, column), side).ravel()
            ordered = colours[np.argsort(shares)]
            assert (np.diff(ordered) > -2).all()
            assert ordered[-1] > ordered[0] + 100


def test_default_patches_and_blocks(run_dir, image, tmp_path, capsys):
    picture = show(run_dir, image, tmp_path / "out.png")
    assert picture.shape[1] == 640
    assert capsys.readouterr().out == f"{tmp_path}/out.png: 640 x {len(picture)} pixels\n"
    spread = ["1,1", "1,2", "2,1", "2,2"]
    named = show(run_dir, image, tmp_path / "named.png", "--patches", *spread, "--blocks", "0", "1")
    assert (picture[-4 * (CELL + LINE) :] == named[-4 * (CELL + LINE) :]).all()


def test_latent_tokens_read_and_have_no_place(finished, image, tmp_path):
    latent = finished(process_embedder_type="latent")
    picture = show(latent, image, tmp_path / "out.png", "--patches", "0,3", "0,15")
    assert (cell(picture, 0, 2) == 128).all()


# --- the picture


def picture_of(maps, num_rows=1) -> Picture:
    pixels, rows = np.zeros((8, 8, 3), np.uint8), [Row((0, number), maps) for number in range(num_rows)]
    return Picture("title", ["a note"], pixels, (4, 4), range(len(maps)), rows)


def test_many_blocks_wrap():
    maps = np.random.default_rng(0).random((24, 4, 4))
    twelve, deep = draw(picture_of(maps[:12], 2)), draw(picture_of(maps, 2))
    assert twelve.width == deep.width == LEFT + 12 * (CELL + GAP) - GAP + MARGIN < 2400
    second = deep.height - twelve.height
    assert second == 2 * (CELL + LINE + GAP) + LINE + GAP
    last = np.asarray(deep).astype(int)
    alone = np.asarray(draw(picture_of(maps[12:], 2))).astype(int)
    assert (cell(last, 1, 2, 11) == cell(alone, 1, 2, 11)).all()


def test_maps_of_equal_colours_differ_in_the_number_below():
    maps = np.random.default_rng(0).random((1, 4, 4))
    sheets = [draw(picture_of(maps * scale)) for scale in (1, 0.5)]
    left, top, right, bottom = ImageChops.difference(*sheets).getbbox()
    assert LEFT < left < right < LEFT + CELL
    assert sheets[0].height - 2 * GAP - LINE <= top < bottom <= sheets[0].height - 2 * GAP


def test_long_notes_stay_inside():
    ends = []
    for note in ("x" * 90, "x" * 400):
        sheet = draw(Picture("title", [note], np.zeros((8, 8, 3), np.uint8), (4, 4), [0], []))
        assert ImageChops.invert(sheet).getbbox()[2] <= sheet.width - MARGIN
        ends.append(sheet.height)
    assert ends[1] == ends[0] + 3 * LINE


# --- what the user may do wrong


def refused(capsys, *arguments) -> str:
    assert show_attention.main([str(part) for part in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", err)
    return err.removeprefix("error: ").rstrip()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ("--patches", "0,0", "1,4"),
            "--patches 1,4: process tokens are 4x4; give rows from 0 to 3 and columns from 0 to 3",
        ),
        (
            ("--write", "--patches", "8,0"),
            "--patches 8,0: memory tokens are 8x8; give rows from 0 to 7 and columns from 0 to 7",
        ),
        (("--blocks", "0", "2"), "--blocks 2: the model has 2 blocks; give numbers from 0 to 1"),
        (("--blocks", "-1"), "--blocks -1: the model has 2 blocks; give numbers from 0 to 1"),
        (
            ("--head", "3"),
            "--head 3: the model reads and writes with 3 heads; give one from 0 to 2, or none, for their mean",
        ),
    ],
)
def test_out_of_range(run_dir, image, tmp_path, capsys, options, text):
    assert refused(capsys, run_dir, image, "-o", tmp_path / "out.png", *options) == text
    assert not (tmp_path / "out.png").exists()


def test_files(run_dir, image, tmp_path, capsys):
    output = tmp_path / "out.png"
    assert "gone: no such file or directory; give a finished run" in refused(capsys, "gone", image, "-o", output)
    lone = tmp_path / "weights" / "ema.safetensors"
    lone.parent.mkdir()
    lone.write_bytes(weights_path(run_dir, "model").read_bytes())
    assert refused(capsys, lone, image, "-o", output).startswith(f"{tmp_path}/recipe.json: no such file; it says how")
    assert refused(capsys, run_dir, "gone.png", "-o", output) == "gone.png: no such file; give a JPEG or PNG"
    (tmp_path / "text.png").write_text("no image")
    assert refused(capsys, run_dir, tmp_path / "text.png", "-o", output) == (
        f"{tmp_path}/text.png: cannot decode an image from 8 bytes: Pillow knows no such format; give a JPEG or PNG"
    )
    assert refused(capsys, run_dir, image, "-o", tmp_path / "gone" / "out.png") == (
        f"-o {tmp_path}/gone/out.png: there is no directory {tmp_path}/gone; make it, or give another one"
    )
    assert refused(capsys, run_dir, image, "-o", "out.jpg") == (
        "-o out.jpg: the picture is a PNG; give a name that ends in .png"
    )


def test_models_without_such_attention(finished, image, tmp_path, capsys):
    output = ("-o", tmp_path / "out.png")
    tl = finished(lambda model: None, rw_head_type="tl")
    assert refused(capsys, tl, image, *output).startswith("rw_head_type='tl' has no attention to show: it makes")
    vit = finished(lambda model: None, name="vit_tiny_patch16_224")
    assert refused(capsys, vit, image, *output) == (
        f"{weights_path(vit, 'model')} is of model.name 'vit_tiny_patch16_224', which has no memory to read from or "
        "write to: give a run of a ViTTM (vittm_* or deittm_*)"
    )
    latent = finished(process_embedder_type="latent")
    assert refused(capsys, latent, image, *output, "--write") == (
        "--write: process tokens of process_embedder_type 'latent' are learned vectors, which have no place in the "
        "image: leave --write out, to see what they read"
    )


def test_conv_memory_is_written_to_when_it_is_no_patches(finished, image, tmp_path, capsys):
    conv = finished(memory_blocks="conv")
    assert refused(capsys, conv, image, "-o", tmp_path / "out.png", "--write") == (
        "--write: memory_blocks 'conv' merges the 64 memory patches into 32 tokens before the write, and these have no "
        "place in the image: leave --write out, to see what is read"
    )
    show(conv, image, tmp_path / "out.png")
    lengths = finished(memory_blocks="conv", memory_encoder_downsamples=(1, 1))
    show(lengths, image, tmp_path / "out.png", "--write")


def test_patches_are_two_numbers(run_dir, image, capsys):
    with pytest.raises(SystemExit, match="2"):
        show_attention.main([str(run_dir), str(image), "-o", "out.png", "--patches", "3"])
    assert "'3' is no patch: give its row and column, as in 2,3" in capsys.readouterr().err
