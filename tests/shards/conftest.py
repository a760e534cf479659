"""Real class folders of small images, and shards made of them."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from shards.index import Index
from shards.sources import class_folders
from shards.writer import WriteOptions, write_split

# The same examples on every machine, however slow.
settings.register_profile("shards", deadline=None, derandomize=True)
settings.load_profile("shards")


def encode(seed: int, image_format: str = "JPEG", size: tuple[int, int] = (12, 8)) -> bytes:
    """An image of noise, `size` = (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def make_folders(root: Path, classes: int = 3, images: int = 7) -> Path:
    """`root`/<class>/<image>, all three image types, one of them under a wrong suffix."""
    formats = ("JPEG", "JPEG", "PNG", "WEBP")
    for label in range(classes):
        folder = root / f"c{label}"
        folder.mkdir(parents=True)
        for number in range(images):
            seed = label * images + number
            (folder / f"c{label}_{number:05d}.JPEG").write_bytes(encode(seed, formats[seed % 4], (12 + number, 8)))
    return root


def write(source: Path, out: Path, split: str = "train", shard_size: int = 5, seed: int = 0) -> Index:
    """Shards of a source, and their index."""
    write_split(*class_folders(source), out, WriteOptions(split, shard_size, seed))
    return Index.load(out)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory by its name."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_folders(tmp_path / "source")


@pytest.fixture
def index(source: Path, tmp_path: Path) -> Index:
    return write(source, tmp_path / "out")


@pytest.fixture
def folders() -> Callable[..., Path]:
    return make_folders


@pytest.fixture
def written() -> Callable[..., Index]:
    return write


@pytest.fixture
def files_of() -> Callable[[Path], dict[str, bytes]]:
    return contents


@pytest.fixture
def image() -> Callable[..., bytes]:
    return encode
