"""The index of a directory of shards: a manifest (`index.json`) and one memory-mapped offsets file a split."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.durable import atomic_file, sync_directory
from shards.errors import UserError

MANIFEST = "index.json"
VERSION = 1
# One row a sample, in the order of the shards: where the image's bytes lie in its shard.
OFFSETS_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])
_MAKE = "python tools/make_shards.py KIND SOURCE OUT (or index DIR, for tars that others wrote)"


@dataclass(frozen=True)
class Shard:
    """One tar: its file name in the index's directory, and what it must hold."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """A split's shards in order; `made_from` records the source and the options that they were written with."""

    name: str
    shards: tuple[Shard, ...]
    offsets_sha256: str
    made_from: Mapping[str, str | int] = field(hash=False)

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def offsets_name(self) -> str:
        return offsets_name(self.name)


@dataclass(frozen=True)
class Index:
    """What a directory of shards holds. A label is a position in `classes`."""

    root: Path
    classes: tuple[str, ...]
    splits: tuple[Split, ...]

    @classmethod
    def load(cls, directory: str | Path) -> "Index":
        """Reads and checks the index of `directory`: every file is there, with the size that the manifest gives.

        UserError for a missing directory, manifest, offsets file or shard, and for one that is malformed, of an
        unknown version, or of another size.
        """
        index = cls.read(directory)
        for split in index.splits:
            _check_shards(index.root, split)
            index.offsets(split.name)
        return index

    @classmethod
    def read(cls, directory: str | Path) -> "Index":
        """What the manifest of `directory` says, without a look at the files that it names; UserError as for `load`."""
        root = Path(directory)
        return cls._parse(root, _read_manifest(root))

    @classmethod
    def _parse(cls, root: Path, manifest: Mapping[str, Any]) -> "Index":
        try:
            splits = tuple(_parse_split(name, entry) for name, entry in manifest["splits"].items())
            return cls(root, tuple(manifest["classes"]), splits)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{root / MANIFEST} is malformed ({reason}); write the shards again: {_MAKE}") from error

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def split(self, name: str) -> Split:
        """The split of that name; UserError names the splits that there are, and the nearest."""
        splits = {split.name: split for split in self.splits}
        if name not in splits:
            nearest = difflib.get_close_matches(name, splits, n=1, cutoff=0.0)
            raise UserError(
                f"no split {name!r} in {self.root}: there is {', '.join(splits) or 'none'}"
                + (f". Did you mean {nearest[0]!r}?" if nearest else f"; write it: {_MAKE}")
            )
        return splits[name]

    def offsets(self, name: str) -> NDArray[np.void]:
        """Rows [num_samples] of OFFSETS_DTYPE, memory-mapped; UserError for a missing or truncated file."""
        split = self.split(name)
        path = self.root / split.offsets_name
        try:
            rows: NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"cannot read the offsets {path} ({error}); write the split again: {_MAKE}") from error
        if rows.dtype != OFFSETS_DTYPE or rows.shape != (split.num_samples,):
            raise UserError(
                f"{path} holds {rows.shape} rows of {rows.dtype}, but the manifest counts {split.num_samples} samples "
                f"(rows of {OFFSETS_DTYPE}); write the split again: {_MAKE}"
            )
        return rows

    def fingerprint(self, name: str) -> str:
        """16 hex digits of a SHA-256 over all that decides the samples of a split and their order."""
        split = self.split(name)
        parts = [self.classes, [asdict(shard) for shard in split.shards], split.offsets_sha256]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def write_manifest(index: Index) -> None:
    """Writes `index.json`, the same bytes for the same index, once everything that it names is on disk."""
    entries = {
        split.name: {
            "made_from": dict(split.made_from),
            "offsets_sha256": split.offsets_sha256,
            "shards": [asdict(shard) for shard in split.shards],
        }
        for split in index.splits
    }
    manifest = {"version": VERSION, "classes": list(index.classes), "splits": entries}
    sync_directory(index.root)
    with atomic_file(index.root / MANIFEST) as file:
        file.write((json.dumps(manifest, sort_keys=True, indent=1) + "\n").encode())
    sync_directory(index.root)


def write_offsets(path: Path, num_samples: int, parts: Iterable[NDArray[np.void]]) -> str:
    """Writes rows of OFFSETS_DTYPE, part by part, as one array [num_samples]; the hash of the file."""
    head = {"descr": np.lib.format.dtype_to_descr(OFFSETS_DTYPE), "fortran_order": False, "shape": (num_samples,)}
    with atomic_file(path) as file:
        np.lib.format.write_array_header_1_0(file, head)
        for rows in parts:
            file.write(rows.tobytes())
    return file.sha256


def offsets_name(split: str) -> str:
    """The file name of a split's offsets."""
    return f"{split}.offsets.npy"


def _read_manifest(root: Path) -> Mapping[str, Any]:
    path = root / MANIFEST
    if not root.is_dir():
        raise UserError(f"the data directory {root} does not exist; check the path, or write shards into it: {_MAKE}")
    if not path.is_file():
        raise UserError(f"{root} has no {MANIFEST}: its shards are missing or unfinished; write them: {_MAKE}")
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is malformed ({error}); write the shards again: {_MAKE}") from error
    if version != VERSION:
        raise UserError(
            f"{path} has version {version!r}, and this code reads version {VERSION}; "
            f"use the code that wrote it, or write the shards again: {_MAKE}"
        )
    return manifest


def _parse_split(name: str, entry: Mapping[str, Any]) -> Split:
    shards = tuple(Shard(**shard) for shard in entry["shards"])
    for file in (offsets_name(name), *(shard.name for shard in shards)):
        # A manifest from elsewhere must not point outside its directory.
        if Path(file).name != file:
            raise ValueError(f"{file!r} is not a plain file name")
    return Split(name, shards, entry["offsets_sha256"], entry["made_from"])


def _check_shards(root: Path, split: Split) -> None:
    for shard in split.shards:
        path = root / shard.name
        if not path.is_file():
            raise UserError(f"shard {path} of split {split.name!r} is missing; copy it again, or rewrite: {_MAKE}")
        if (size := path.stat().st_size) != shard.num_bytes:
            raise UserError(
                f"shard {path} has {size} bytes and the manifest says {shard.num_bytes}: it was cut short or replaced; "
                f"copy it again, or rewrite: {_MAKE}"
            )
