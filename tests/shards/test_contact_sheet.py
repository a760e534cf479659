"""A contact sheet shows the samples that the index holds, each with its label."""

import numpy as np
import pytest
from PIL import Image

from shards.checking.contact_sheet import write_contact_sheet
from shards.errors import UserError
from shards.index import Index

SIZE = (8 * 168 + 8, 8 * 198 + 8)


def draw(index, path, splits=("train",), seed=0):
    write_contact_sheet(index, splits, path, seed)
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", SIZE)
        return np.asarray(image)


def cells(sheet):
    """Of each cell [64], the thumbnail [160, 160, 3] and the lines of text [30, 160, 3]."""
    corners = [(8 + 198 * row, 8 + 168 * column) for row in range(8) for column in range(8)]
    return [(sheet[y : y + 160, x : x + 160], sheet[y + 160 : y + 190, x : x + 160]) for y, x in corners]


def is_drawn(part):
    return part.min() < 128


def test_every_sample_of_few_is_drawn_once(index, tmp_path):
    sheet = draw(index, tmp_path / "sheet.png")
    drawn = [is_drawn(thumbnail) and is_drawn(text) for thumbnail, text in cells(sheet)]
    assert drawn == [True] * 21 + [False] * 43
    assert len({thumbnail.tobytes() for thumbnail, _ in cells(sheet)[:21]}) == 21
    assert len({text.tobytes() for _, text in cells(sheet)[:21]}) == 21


def test_the_seed_draws(index, tmp_path):
    first, again, other = (draw(index, tmp_path / f"{n}.png", seed=seed) for n, seed in enumerate((0, 0, 1)))
    assert (first == again).all()
    assert (first != other).any()


def test_splits_share_the_sheet(index, source, written, tmp_path):
    written(source, index.root, "val")
    sheet = draw(Index.load(index.root), tmp_path / "sheet.png", ("train", "val"))
    assert [is_drawn(thumbnail) for thumbnail, _ in cells(sheet)] == [True] * 42 + [False] * 22


def test_a_thumbnail_is_the_image(written, tmp_path):
    """Red above and blue below, wider than high."""
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:20, :, 0] = pixels[20:, :, 2] = 255
    (tmp_path / "source/c0").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "source/c0/a.png")
    thumbnail, _ = cells(draw(written(tmp_path / "source", tmp_path / "out"), tmp_path / "sheet.png"))[0]
    assert (thumbnail[[45, 115], 80] == [[255, 0, 0], [0, 0, 255]]).all()
    assert (thumbnail[[20, 140], 80] == 255).all()


def test_of_names_that_are_too_long_both_ends_are_shown(written, image, tmp_path):
    for name in ("a" + "x" * 60 + "1", "b" + "x" * 60 + "1", "a" + "x" * 60 + "2"):
        (tmp_path / "source" / name).mkdir(parents=True)
        (tmp_path / "source" / name / "same.jpg").write_bytes(image(0))
    sheet = draw(written(tmp_path / "source", tmp_path / "out"), tmp_path / "sheet.png")
    classes = [text[:15] for _, text in cells(sheet)[:3]]
    assert len({name[:, :10].tobytes() for name in classes}) == 2
    assert len({name.tobytes() for name in classes}) == 3


def test_what_cannot_be_read_is_red(index, tmp_path):
    path = index.root / "train-000000.tar"
    path.write_bytes(bytes(path.stat().st_size))
    sheet = draw(index, tmp_path / "sheet.png")
    red = [(thumbnail == [200, 0, 0]).all() for thumbnail, _ in cells(sheet)]
    assert sum(red) == 5
    assert all(is_drawn(text) for _, text in cells(sheet)[:21])


def test_what_cannot_be_drawn(index, tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*nowhere/sheet\.png"):
        write_contact_sheet(index, ("train",), tmp_path / "nowhere/sheet.png", 0)
    (index.root / "train.offsets.npy").unlink()
    with pytest.raises(UserError, match="cannot read the offsets"):
        write_contact_sheet(index, ("train",), tmp_path / "sheet.png", 0)
