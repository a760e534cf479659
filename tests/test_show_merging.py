"""tools/show_merging.py: boxes and weights are where the masks have them, in every family; what it refuses."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.models.build import make_model
from pipeline.models.ltm.maps import merged_on, num_maps
from pipeline.recipe import Augment, Model, Recipe
from pipeline.record import keep_recipe, weights_path
from pipeline.telemetry.attention_picture import CELL, GAP, LINE, MARGIN
from tools import show_merging

SIDES = {"ltm_vit_small": 32, "ltm_swin_tiny": 32, "ltm_mobilevit_xs": 64, "ltm_efficientvit_b1": 64}
OPTIONS = {
    "ltm_vit_small": {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3},
    "ltm_swin_tiny": {"width_factor": 0.25},
    "ltm_mobilevit_xs": {"width_factor": 0.5},
    "ltm_efficientvit_b1": {"width_factor": 0.25},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Callable[..., Path]:
    """finished(name of a model, **options) -> run directory."""

    def make(name: str, **options: object) -> Path:
        recipe = Recipe(augment=Augment(image_size=SIDES.get(name, 32)), model=Model(name=name, **options))
        run_dir = tmp_path_factory.mktemp("run")
        keep_recipe(run_dir, recipe)
        weights_path(run_dir, "model").parent.mkdir()
        save_file(make_model(recipe, 5).state_dict(), weights_path(run_dir, "model"))
        return run_dir

    return make


@pytest.fixture(scope="module")
def vit(finished) -> Path:
    return finished("ltm_vit_small", **OPTIONS["ltm_vit_small"])


@pytest.fixture
def image(tmp_path) -> Path:
    """Grey, of two halves."""
    pixels = np.full((80, 80, 3), 90, np.uint8)
    pixels[:, 40:] = 160
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def show(run_dir, image, output, *options) -> np.ndarray:
    """The picture, [height, width, 3]."""
    assert show_merging.main([str(part) for part in (run_dir, image, "-o", output, *options)]) == 0
    with Image.open(output) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def column(picture, number) -> tuple[np.ndarray, np.ndarray]:
    """The image and the heat map of a column."""
    bottom, left = len(picture) - MARGIN - LINE - GAP, MARGIN + number * (CELL + GAP)
    below, above = bottom - CELL, bottom - 2 * CELL - GAP
    return picture[above : above + CELL, left : left + CELL], picture[below : below + CELL, left : left + CELL]


# --- what merged where


@torch.no_grad()
@pytest.mark.parametrize("name", OPTIONS)
def test_maps_have_every_token_s_group_and_weight(name):
    """Against the dense masks: what the tokens of a merged token weigh is 1 together, at their places of the image."""
    recipe = Recipe(augment=Augment(image_size=SIDES[name]), model=Model(name=name, **OPTIONS[name]))
    model = make_model(recipe, 5).eval()
    model(torch.randn(1, 3, SIDES[name], SIDES[name]))
    masks = model.merge_map()
    assert num_maps(model) == len(masks)
    for number in (0, 1):
        targets, weights = merged_on(model, number)
        mask = masks[0] @ masks[1] if name == "ltm_vit_small" and number else masks[number]
        totals = torch.zeros(mask.shape[0] * mask.shape[2]).index_add(0, targets.flatten(), weights.flatten())
        torch.testing.assert_close(totals, torch.ones_like(totals))
        torch.testing.assert_close(weights.flatten().sort().values, mask.sum(dim=2).flatten().sort().values)
    side = {"ltm_vit_small": 4, "ltm_swin_tiny": 8, "ltm_mobilevit_xs": 8, "ltm_efficientvit_b1": 4}[name]
    targets, _ = merged_on(model, 0)
    assert targets.shape == (side, side)
    sets = {  # tokens that merge apart: windows of Swin side by side, of MobileViT every other pixel
        "ltm_swin_tiny": targets[:4, :4],
        "ltm_mobilevit_xs": targets[::2, ::2],
    }
    if name in sets:
        assert sets[name].max() < masks[0].shape[2]
        assert (targets < masks[0].shape[2]).sum() == sets[name].numel()


def test_a_red_box_and_a_heat_map(vit, image, tmp_path, capsys):
    picture = show(vit, image, tmp_path / "out.png", "--patches", "1,2", "0,0")
    assert capsys.readouterr().out == f"{tmp_path}/out.png: {picture.shape[1]} x {len(picture)} pixels\n"
    side = CELL // 4
    above, below = column(picture, 0)
    red = np.argwhere((above == (255, 0, 0)).all(axis=2))
    assert red.min(axis=0).tolist() == [side - 2, 2 * side - 2]
    assert red.max(axis=0).tolist() == [2 * side + 1, 3 * side + 1]
    bright = below[side // 2 :: side, side // 2 :: side].sum(axis=2)
    model = show_merging._ltm(show_merging.load_run(vit))
    pixels = np.full((32, 32, 3), 90, np.uint8)
    with Image.open(image) as opened:
        pixels = np.asarray(opened.resize((37, 37)).crop((2, 2, 34, 34)).convert("RGB"))
    targets, _ = show_merging._merged(model, pixels, 0)
    assert bright[1, 2] > bright[targets != targets[1, 2]].max()


def test_the_default_shows_the_largest_groups(vit, image, tmp_path):
    picture = show(vit, image, tmp_path / "out.png")
    assert picture.shape[1] == 2 * MARGIN + 4 * (CELL + GAP) - GAP
    for number in range(4):
        assert (column(picture, number)[0] == (255, 0, 0)).all(axis=2).any()
    later = show(vit, image, tmp_path / "later.png", "--block", "2")
    assert not np.array_equal(later, picture)


# --- what the user may do wrong


def refused(capsys, *arguments) -> str:
    assert show_merging.main([str(part) for part in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", err)
    return err.removeprefix("error: ").rstrip()


def test_refusals(vit, finished, image, tmp_path, capsys):
    output = ("-o", tmp_path / "out.png")
    assert refused(capsys, vit, image, *output, "--patches", "0,0", "4,1") == (
        "--patches 4,1: the block's tokens are 4x4; give rows from 0 to 3 and columns from 0 to 3"
    )
    assert refused(capsys, vit, image, *output, "--block", "3") == (
        "--block 3: the model has 3 blocks; give a number from 0 to 2"
    )
    assert refused(capsys, vit, "gone.png", *output) == "gone.png: no such file; give a JPEG or PNG"
    assert refused(capsys, vit, image, "-o", "out.jpg") == (
        "-o out.jpg: the picture is a PNG; give a name that ends in .png"
    )
    whole = finished("ltm_vit_small", compression_ratio=1.0, **OPTIONS["ltm_vit_small"])
    assert refused(capsys, whole, image, *output) == (
        f"{weights_path(whole, 'model')} is of model.name 'ltm_vit_small', which merges no tokens: give a run of an "
        "ltm_* model of a compression_ratio below 1"
    )
    plain = finished("vit_tiny_patch16_224")
    assert "'vit_tiny_patch16_224', which merges no tokens" in refused(capsys, plain, image, *output)
