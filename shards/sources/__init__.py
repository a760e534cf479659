"""Where images come from: each source lists its classes and its samples, whose bytes are read when they are needed."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards import ustar
from shards.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_MAX_KEY_BYTES = ustar.MAX_NAME_BYTES - len(".json")
_MAX_LISTED = 10


@dataclass(frozen=True, slots=True)
class Sample:
    """An image file. `key` is unique in its source and holds no dot and no path separator."""

    key: str
    label: int
    path: str
    num_bytes: int

    @property
    def filename(self) -> str:
        return os.path.basename(self.path)

    def read(self) -> bytes:
        """The file's bytes; OSError where it cannot be read."""
        with open(self.path, "rb") as file:
            return file.read()


def class_folders(source: str | Path) -> tuple[tuple[str, ...], tuple[Sample, ...]]:
    """Classes and samples of SOURCE/<class>/<image>: the sorted folder names are the classes, files come sorted too.

    Names that begin with a dot and files that are no images by their suffix are passed over. UserError for a missing
    directory, no class folder, one without images or with folders inside, and for names that cannot be unique keys.
    """
    root = Path(source)
    if not root.is_dir():
        raise UserError(f"the source directory {root} does not exist; give a directory that holds one folder a class")
    classes = tuple(sorted(entry.name for entry in _visible(root) if entry.is_dir()))
    if not classes:
        raise UserError(f"{root} holds no class folders; the layout is {root}/<class>/<image>.jpg")
    samples = tuple(sample for label, name in enumerate(classes) for sample in _class_samples(root / name, label))
    _check_keys(samples)
    return classes, samples


def listing_sha256(classes: Sequence[str], samples: Sequence[Sample]) -> str:
    """A hash of class names, file names and file sizes, wherever the source lies: it tells one source from another."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{classes[sample.label]}/{sample.filename}\0{sample.num_bytes}\n".encode())
    return digest.hexdigest()


def _visible(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot list {directory}: {error.strerror}; check its permissions") from error


def _class_samples(folder: Path, label: int) -> list[Sample]:
    entries = _visible(folder)
    folders = [entry.name for entry in entries if entry.is_dir()]
    if folders:
        raise UserError(
            f"class folder {folder} holds folders ({_some(folders)}), but images lie directly in their class folder; "
            f"if {folders[0]!r} is a class, give {folder} as the source, else move its images up"
        )
    images = [entry for entry in entries if entry.name.lower().endswith(SUFFIXES)]
    if not images:
        raise UserError(f"class folder {folder} has no images ({', '.join(SUFFIXES)}); add some or remove the folder")
    return [_sample(folder.name, label, entry) for entry in images]


def _sample(class_name: str, label: int, entry: os.DirEntry[str]) -> Sample:
    if not entry.is_file():
        raise UserError(f"{entry.path} is not a file but a broken link or a device; remove it or put the image there")
    stem = os.path.splitext(entry.name)[0]
    # ImageNet's names (n01440764_10026) carry their class already.
    key = stem if stem.startswith(f"{class_name}_") else f"{class_name}_{stem}"
    return Sample(key, label, entry.path, entry.stat().st_size)


def _check_keys(samples: Sequence[Sample]) -> None:
    problems = list(_key_problems(samples))
    if problems:
        raise UserError(
            f"{len(problems)} files have names that cannot be sample keys; rename them: {_some(problems)}. "
            f"A key is <class>_<name without suffix>, unique, without dots, {_MAX_KEY_BYTES} bytes of UTF-8 at most."
        )


def _key_problems(samples: Sequence[Sample]) -> Iterator[str]:
    seen: dict[str, str] = {}
    for sample in samples:
        reason = _unfit(sample.key)
        if sample.key in seen:
            reason = f"the key {sample.key!r} is also that of {seen[sample.key]}"
        if reason:
            yield f"{sample.path!a} ({reason})"
        seen[sample.key] = sample.path


def _unfit(key: str) -> str:
    if "." in key:
        return f"a dot in {key!r}"
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        return "not UTF-8"
    return f"{size} bytes" if size > _MAX_KEY_BYTES else ""


def _some(items: Sequence[str]) -> str:
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return ", ".join(items[:_MAX_LISTED]) + more
