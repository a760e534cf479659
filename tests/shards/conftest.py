"""Real class folders of small images, and shards made of them."""

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image
from remote_server import Server, serve

from shards.engine import open_engine
from shards.index import Index
from shards.sources.folders import ClassFolders
from shards.writing.options import WriteOptions
from shards.writing.writer import write as write_shards

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
    """`root`/<class>/<image>, all three image types."""
    formats = ("JPEG", "JPEG", "PNG", "WEBP")
    for label in range(classes):
        folder = root / f"c{label}"
        folder.mkdir(parents=True)
        for number in range(images):
            seed = label * images + number
            kind = formats[seed % 4]
            (folder / f"c{label}_{number:05d}.{kind}").write_bytes(encode(seed, kind, (12 + number, 8)))
    return root


def write(source: Path, out: Path, split: str = "train", shard_size: int = 5, seed: int = 0) -> Index:
    """Shards of a source, and their index."""
    with open_engine("local", 1) as engine:
        write_shards(ClassFolders(source, split), out, WriteOptions(shard_size=str(shard_size), seed=seed), engine)
    return Index.load(out)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory by its path there."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_folders(tmp_path / "source")


@pytest.fixture(scope="session")
def written_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the same images as `source`."""
    root = tmp_path_factory.mktemp("once")
    return write(make_folders(root / "source"), root / "out").root


@pytest.fixture
def index(written_once: Path, tmp_path: Path) -> Index:
    """A copy of them, which a test may damage."""
    return Index.load(shutil.copytree(written_once, tmp_path / "out"))


@pytest.fixture
def server(index: Index) -> Iterator[Server]:
    """The copy, served over HTTP."""
    with serve(index.root) as running:
        yield running


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
