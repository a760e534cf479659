"""ILSVRC2012_img_val.tar, whose images lie flat, with the labels of ILSVRC2012_devkit_t12."""

import gzip
import io
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from shards.classes import check_classes, some, text_lines
from shards.errors import UserError
from shards.sources.base import Entry, Rejected, is_image_name
from shards.sources.fetch import Ranges
from shards.tars.walk import walk

_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_RIGHT = "give ILSVRC2012_devkit_t12.tar.gz (2.5 MB), or the folder that it extracts to"
# The real ones: an archive of 2.5 MB, files below 1 MB, 1,860 synsets.
_MAX_DEVKIT_BYTES = 64 << 20
_MAX_SYNSETS = 100_000


@dataclass(frozen=True)
class IlsvrcVal:
    """The split val: `path` is the tar, `devkit` the archive or its extracted folder, `classes` the wnids.

    The devkit numbers the classes in an order of its own, so its numbers are never labels: they lead to wnids.
    """

    path: str
    devkit: str
    classes: tuple[str, ...]

    in_order = False
    p_rule = None

    def scan(self) -> Iterator[Entry | Rejected]:
        """UserError for a wrong devkit or tar, wrong classes, and images and labels that are not one to one."""
        wnids = _read_labels(Path(self.devkit), self.classes)
        path, seen = os.path.abspath(self.path), bytearray(len(wnids))
        with _opened(path) as file:
            for member in walk(file):
                name = os.path.basename(member.name)
                if member.kind == "directory" or name.startswith(".") or not is_image_name(name):
                    continue
                position = _position(name, seen, path)
                seen[position] = 1
                if member.kind == "file":
                    yield Entry("val", wnids[position], name, path, member.offset, member.size)
                else:
                    yield Rejected("val", f"{path!a}: {member.name!a}", f"no regular file but of kind {member.kind!r}")
        _check_whole(path, seen)

    def fetcher(self) -> Ranges:
        return Ranges()


def _opened(path: str) -> BinaryIO:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise UserError(f"cannot read {path!a}: {error.strerror}; give ILSVRC2012_img_val.tar") from error


def _position(name: str, seen: bytearray, path: str) -> int:
    """The image's place among the labels, from 0."""
    match = _NAME.fullmatch(name)
    if not match:
        raise UserError(
            f"{path!a} holds {name!a}, and ILSVRC2012_img_val.tar only images named ILSVRC2012_val_<8 digits>.JPEG; "
            "is it another archive?"
        )
    position = int(match[1]) - 1
    if not 0 <= position < len(seen):
        raise UserError(f"{path!a} holds {name}, and the devkit has labels of images 1 to {len(seen)}; {_RIGHT}")
    if seen[position]:
        raise UserError(f"{path!a} holds {name} twice; download it again")
    return position


def _check_whole(path: str, seen: bytearray) -> None:
    missing = [f"ILSVRC2012_val_{position + 1:08d}.JPEG" for position, there in enumerate(seen) if not there]
    if missing:
        raise UserError(
            f"{path!a} holds {len(seen) - len(missing)} images, and the devkit has {len(seen)} labels: {some(missing)} "
            "missing; download the tar again"
        )


# --- the devkit


def _read_labels(devkit: Path, classes: tuple[str, ...]) -> list[str]:
    """The wnid of each image, in the order of their numbers."""
    try:
        files = _read_folder(devkit) if devkit.is_dir() else _read_archive(devkit)
    except (UserError, OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{str(devkit)!a} cannot be read as the devkit ({error}); {_RIGHT}") from error
    for name in (_TRUTH, _META):
        if name not in files:
            raise UserError(f"{str(devkit)!a} holds no data/{name}; {_RIGHT}")
    wnids = _read_synsets(files[_META], f"{_META} of {devkit}")
    check_classes(wnids.values(), classes, ascii(f"{_META} of {devkit}"))
    where = f"{_TRUTH} of {devkit}"
    lines = text_lines(files[_TRUTH], where, "the labels of ILSVRC 2012")
    return [_wnid(line, number, wnids, where) for number, line in enumerate(lines, 1)]


def _wnid(line: str, number: int, wnids: dict[str, str], where: str) -> str:
    if line.strip() not in wnids:
        raise UserError(f"line {number} of {where!a} is {line[:80]!a}, not one of its {len(wnids)} class ids; {_RIGHT}")
    return wnids[line.strip()]


def _read_folder(folder: Path) -> dict[str, bytes]:
    """The two files, from the folder, its folder data, or that of a folder in between."""
    found: dict[str, bytes] = {}
    for place in (folder, folder / "data", *sorted(folder.glob("*/data"))):
        for path in (place / _TRUTH, place / _META):
            if path.is_file():
                with open(path, "rb") as file:
                    found.setdefault(path.name, _read(file, path.stat().st_size))
    return found


def _read_archive(archive: Path) -> dict[str, bytes]:
    _check_size(archive.stat().st_size)
    found: dict[str, bytes] = {}
    with gzip.open(archive) as file:
        for member in walk(cast(BinaryIO, file)):
            name = os.path.basename(member.name)
            if member.kind == "file" and name in (_TRUTH, _META):
                file.seek(member.offset)
                found[name] = _read(cast(BinaryIO, file), member.size)
    return found


def _read(file: BinaryIO, size: int) -> bytes:
    _check_size(size)
    return file.read(size)


def _check_size(size: int) -> None:
    if size > _MAX_DEVKIT_BYTES:
        raise ValueError(f"{size} bytes are more than {_MAX_DEVKIT_BYTES}")


def _read_synsets(data: bytes, where: str) -> dict[str, str]:
    """The wnid of each ILSVRC id, in digits; synsets with children are no classes."""
    scipy_io = _scipy_io()
    try:
        rows = [row for row in _load_synsets(scipy_io, data) if int(row["num_children"]) == 0]
        wnids = {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in rows}
    except Exception as error:  # scipy's readers raise many kinds
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{where!a} is not the table of ILSVRC 2012's synsets ({reason}); {_RIGHT}") from error
    if len(set(wnids.values())) < len(rows):
        raise UserError(f"{where!a} has an id or a wnid twice among its {len(rows)} classes; {_RIGHT}")
    return wnids


def _scipy_io() -> Any:
    try:
        import scipy.io
    except ImportError as error:
        raise UserError(f"{_META} is read by scipy, which is missing: pip install 'vittm-pipeline[data]'") from error
    return scipy.io


def _load_synsets(scipy_io: Any, data: bytes) -> NDArray[np.void]:
    """The rows of the MATLAB 5 struct array `synsets`; scipy's reader of it runs nothing from the file."""
    heads = {name: (shape, kind) for name, shape, kind in scipy_io.whosmat(io.BytesIO(data))}
    shape, kind = heads["synsets"]
    if kind != "struct" or math.prod(shape) > _MAX_SYNSETS:
        raise ValueError(f"synsets is a {kind} array of {shape}, not a struct array of at most {_MAX_SYNSETS}")
    return scipy_io.loadmat(io.BytesIO(data), variable_names=["synsets"], squeeze_me=True)["synsets"].reshape(-1)
