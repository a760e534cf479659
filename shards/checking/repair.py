"""The index of a directory of shards made anew from its tars, where the manifest or the offsets are lost or wrong."""

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shards.durable import explained, locked
from shards.engine import Advance, Engine
from shards.errors import UserError
from shards.files import has_sha256
from shards.index import MANIFEST, Index, Split, write_manifest, write_offsets
from shards.progress import Progress
from shards.tars.contents import TarIndex, TarTask, index_tar
from shards.tars.in_place import IN_PLACE, ForeignOptions, index_in_place, tars_in
from shards.writing.sidecars import write_sidecars

_ASIDE = "index.json.broken"
_REPAIRED = {"repaired": "from tars"}


def repair_index(directory: Path, classes: tuple[str, ...], engine: Engine) -> tuple[str, ...]:
    """Reads the tars of a directory and writes offsets, manifest and sidecars; says what became of it, a line each.

    Without a manifest that can be read, all tars are indexed as by `index_in_place`, with `classes` or
    those that their json names. With one, its classes hold, and each split that make_shards wrote gets the tars that
    bear its name; where they are not those of the manifest, make_shards no longer takes the split for its own work.

    UserError for a directory without tars, damaged tars, samples that cannot be indexed, labels that are not of the
    class that the json names, a running make_shards, and a full disk.
    """
    root = directory.absolute()
    tars = tars_in(root)
    with Progress("indexing", None, sum(path.stat().st_size for path in tars)) as progress:
        try:
            index = Index.read(root)
        except UserError:
            return _rebuild(root, classes, engine, progress.advance)
        with explained(root), locked(root), tempfile.TemporaryDirectory() as work:
            return _repair(index, Path(work), engine, progress.advance)


def _rebuild(root: Path, classes: tuple[str, ...], engine: Engine, advance: Advance) -> tuple[str, ...]:
    """A manifest that cannot be read is put aside, and back where the tars give none either."""
    manifest, aside = root / MANIFEST, root / _ASIDE
    was_there = manifest.exists()
    with explained(root):
        if was_there:
            os.replace(manifest, aside)
        try:
            indexed = index_in_place(root, ForeignOptions(classes=classes), engine, advance)
        except BaseException:
            if was_there:
                os.replace(aside, manifest)
            raise
    write_sidecars(indexed.index)
    lines = [f"{MANIFEST} was made from the tars" + f"; what was there is {_ASIDE} now" * was_there]
    lines += [f"{split.name}: {_contents(split)}" for split in indexed.index.splits]
    if indexed.num_unnamed:
        lines.append(f"{indexed.num_unnamed} classes have no name in the tars: give a list of them with --classes")
    return tuple(lines)


def _repair(index: Index, work: Path, engine: Engine, advance: Advance) -> tuple[str, ...]:
    tars = {split.name: _tars(index.root, split) for split in index.splits if IN_PLACE not in split.made_from}
    tasks = [TarTask(index.root / name, work, "", index.num_classes) for names in tars.values() for name in names]
    found: dict[str, TarIndex] = {}
    for tar in engine.run(index_tar, tasks, advance):
        _check(index, tar)
        found[tar.shard.name] = tar
    splits, lines = [], []
    for before in index.splits:
        split, line = before, f"{before.name}: left as it is; python tools/make_shards.py index made it, and repairs it"
        if before.name in tars:
            were_right = has_sha256(index.root / before.offsets_name, before.offsets_sha256)
            split = _repaired(index.root, before, [found[name] for name in tars[before.name]], work)
            line = f"{split.name}: {_contents(split)}, "
            line += "as before" if were_right and split == before else f"before: {_contents(before)}"
        splits.append(split)
        lines.append(line)
    repaired = Index(index.root, index.classes, tuple(splits))
    write_sidecars(repaired)
    write_manifest(repaired)
    return tuple(lines)


def _tars(root: Path, split: Split) -> list[str]:
    """The names of the tars of a split that are there; UserError where none is."""
    names = {shard.name for shard in split.shards if (root / shard.name).exists()}
    names |= {
        path.name for path in root.iterdir() if re.fullmatch(rf"{re.escape(split.name)}-\d{{6,}}\.tar", path.name)
    }
    if not names:
        raise UserError(f"none of the tars of split {split.name!r} is in {root}; copy them there first")
    return sorted(names)


def _check(index: Index, tar: TarIndex) -> None:
    """UserError where the index cannot hold all of a tar, as the manifest's classes are."""
    if tar.left_out:
        listed = "\n  ".join(tar.left_out)
        raise UserError(f"{tar.num_left_out} samples of {tar.shard.name} cannot be indexed; copy it again:\n  {listed}")
    for label, name in tar.names.items():
        known = index.classes[int(label)]
        if known != name:
            raise UserError(
                f"label {label} is class {known!a} in {MANIFEST}, and {name!a} in {tar.shard.name}. "
                f"Copy the tar again; or, where {MANIFEST} is wrong, remove it and repair again"
            )


def _repaired(root: Path, before: Split, tars: Sequence[TarIndex], work: Path) -> Split:
    """The split with those tars; its offsets are written."""
    shards = tuple(tar.shard for tar in tars)
    num_samples = sum(shard.num_samples for shard in shards)
    rows = (np.load(work / f"{shard.name}.npy", allow_pickle=False) for shard in shards)
    sha256 = write_offsets(root / before.offsets_name, num_samples, rows)
    made_from = before.made_from if shards == before.shards else _REPAIRED
    return Split(before.name, shards, sha256, made_from)


def _contents(split: Split) -> str:
    return f"{split.num_samples:,} images in {len(split.shards):,} shards"
