"""Before the first shard is written: what the source holds, what OUT holds already, and whether it all fits."""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.durable import atomic_file, sync_directory
from shards.errors import UserError
from shards.estimate import Estimate, estimate
from shards.index import MANIFEST, Index, Split
from shards.listing import Listing
from shards.options import ShardSize, WriteOptions, share
from shards.parts import Job, work_directory
from shards.scan import Minival, scan
from shards.sources.base import Rejected, Source

SCRATCH = ".scan"  # in OUT; of no use to the next run
_MAX_LISTED = 5
_SURELY = 0.8  # of an estimate from 64 images


@dataclass(frozen=True)
class Task:
    """A split to be written, what the manifest will say of its making, and what a sample is thought to cost."""

    job: Job
    made_from: Mapping[str, str | int]
    cost: Estimate

    @property
    def num_bytes(self) -> int:
        """About the size of the split's tars."""
        return round(self.cost.num_bytes * self.job.num_images)


@dataclass(frozen=True)
class Begun:
    """The splits to be written, those that were there already, and the files that cannot be samples of the former."""

    index: Index
    tasks: tuple[Task, ...]
    finished: tuple[Split, ...]
    rejected: tuple[Rejected, ...]


def begin(source: Source, out: Path, options: WriteOptions, seen: Callable[[], None]) -> Begun:
    """Scans the source into the work directories of OUT, which must be locked.

    UserError for what speaks against writing: another source or other options than those of a finished or of an
    unfinished split, other classes, shards of unknown origin, splits that the source lacks, and too little room.
    """
    index = Index.load(out) if (out / MANIFEST).exists() else Index(out, (), ())
    scratch = out / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        scanned = scan(source, scratch, _places(out, index, options.splits), _minival(options), seen)
    finally:
        shutil.rmtree(scratch)
    if missing := set(options.splits) - set(scanned.listings):
        raise UserError(f"the source has no split {_some(sorted(missing))}; it has {_some(sorted(scanned.splits))}")
    tasks, finished = [], []
    for split, listing in scanned.listings.items():
        if not len(listing):
            raise UserError(f"split {split!r} has no image left: all classes are too small for what is cut out")
        check_classes_agree(index, scanned.classes, split)
        task = _task(source, out, split, listing, options)
        there = _finished(index, task)
        if there:
            shutil.rmtree(task.job.work)
            finished.append(there)
        else:
            tasks.append(task)
    _check_room(out, tasks)
    for task in tasks:
        _resume(out, task)
    to_write = {task.job.split for task in tasks}
    rejected = tuple(file for file in scanned.rejected if file.split in to_write)
    return Begun(Index(out, scanned.classes, index.splits), tuple(tasks), tuple(finished), rejected)


def _minival(options: WriteOptions) -> Minival | None:
    return Minival(share(options.minival, "a minival"), options.seed) if options.minival else None


def _places(out: Path, index: Index, wanted: Sequence[str]) -> Callable[[str], Path | None]:
    """Makes the work directory of a split, or none where it is not wanted; never beside shards of unknown origin."""

    def place(split: str) -> Path | None:
        if wanted and split not in wanted:
            return None
        work = work_directory(out, split)
        unknown = [path.name for path in out.iterdir() if re.fullmatch(rf"{re.escape(split)}-\d+\.tar", path.name)]
        if unknown and not work.is_dir() and split not in [there.name for there in index.splits]:
            raise UserError(
                f"{out} holds {min(unknown)}, which is in no index here and would be overwritten; "
                "move it away or choose another OUT"
            )
        work.mkdir(exist_ok=True)
        return work

    return place


def _task(source: Source, out: Path, split: str, listing: Listing, options: WriteOptions) -> Task:
    cost = estimate(source, listing, options.seed, options.images)
    num_shards = ShardSize.parse(options.shard_size).num_shards(len(listing), cost.num_bytes)
    job = Job(
        out=out,
        split=split,
        source=source,
        listing_sha256=listing.sha256,
        num_images=len(listing),
        num_shards=num_shards,
        seed=options.seed,
        images=options.images,
    )
    made_from: dict[str, str | int] = {"images": len(listing), "source listing": listing.sha256}
    return Task(job, {**made_from, "shards": num_shards, **options.that_decide_bytes()}, cost)


def check_classes_agree(index: Index, classes: Sequence[str], split: str) -> None:
    """UserError where a split has other classes than the splits of an index."""
    missing, extra = sorted(set(index.classes) - set(classes)), sorted(set(classes) - set(index.classes))
    if index.splits and (missing or extra):
        raise UserError(
            f"the classes of {split!r} differ from those of the splits in {index.root}: missing {_some(missing)}; "
            f"extra {_some(extra)}. All splits of one OUT share their class folders: mend SOURCE or choose another OUT."
        )


def _finished(index: Index, task: Task) -> Split | None:
    split = next((split for split in index.splits if split.name == task.job.split), None)
    if split is None:
        return None
    if changes := _changes(split.made_from, task.made_from):
        shutil.rmtree(task.job.work)
        raise UserError(
            f"split {split.name!r} in {index.root} is finished, and was made from another source or with other options "
            f"({changes}). Repeat those, or choose another OUT."
        )
    return split


def _changes(before: Mapping[str, str | int], now: Mapping[str, str | int]) -> str:
    return "; ".join(
        f"{what}: {before.get(what)} there, {value} asked" for what, value in now.items() if before.get(what) != value
    )


def _check_room(out: Path, tasks: Sequence[Task]) -> None:
    """A spool is deleted once its tar is written, so spools need no room beside that of the tars."""
    for task in tasks:
        written = sum(path.stat().st_size for path in (*out.glob(f"{task.job.split}-*.tar"), *task.job.work.iterdir()))
        needed = round(task.num_bytes * _SURELY) - written
        free = shutil.disk_usage(out).free
        if needed > free:
            raise UserError(
                f"split {task.job.split!r} needs about {task.num_bytes:,} bytes ({written:,} are written), and "
                f"{free:,} are free in {out}. Make room, choose another OUT, or smaller images (--resize, --quality)."
            )


def _resume(out: Path, task: Task) -> None:
    """Keeps the finished shards of an unfinished run, removes its temporaries; UserError where it was another run."""
    split, record = task.job.split, task.job.work / "made_from.json"
    if record.exists():
        if changes := _changes(json.loads(record.read_bytes()), task.made_from):
            raise UserError(
                f"split {split!r} in {out} is unfinished, and was begun from another source or with other options "
                f"({changes}). Repeat those; or remove {task.job.work}, and its shards, to begin anew."
            )
    else:
        with atomic_file(record) as file:
            file.write(json.dumps(dict(task.made_from)).encode())
        sync_directory(out)
    _remove_temporaries(out, task.job.work)


def _remove_temporaries(out: Path, work: Path) -> None:
    """What killed runs left in OUT, which is locked, so that nobody else is writing."""
    for directory in (out, out / ".nv-meta", work):
        for path in directory.glob("*.tmp"):
            if re.fullmatch(r".+\.(tar|idx|npy|json|yaml|gz)\.\d+\.tmp", path.name):
                path.unlink()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_LISTED]) + (f", ... ({len(names)})" if len(names) > _MAX_LISTED else "") or "none"
