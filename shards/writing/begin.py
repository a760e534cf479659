"""Before the first shard is written: what the source holds, what OUT holds already, and whether it all fits."""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.durable import atomic_file, sync_directory
from shards.errors import UserError
from shards.index import MANIFEST, Index, Split
from shards.sources.base import Rejected, Source
from shards.writing.estimate import Estimate, estimates
from shards.writing.listing import Listing
from shards.writing.options import ShardSize, WriteOptions, share
from shards.writing.parts import Job, work_directory
from shards.writing.scan import Minival, Scanned, scan

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


def existing_index(out: Path) -> Index:
    """The index of OUT, which has no splits where there is none yet."""
    return Index.load(out) if (out / MANIFEST).exists() else Index(out, (), ())


def begin(source: Source, out: Path, index: Index, options: WriteOptions, seen: Callable[[], None]) -> Begun:
    """Scans the source into the work directories of OUT, which must be locked; `index` holds the splits that are there.

    UserError for what speaks against writing: another source or other options than those of a finished or of an
    unfinished split, other classes, shards of unknown origin, splits that the source lacks, and too little room.
    """
    try:
        scanned = _scan(source, out, index, options, seen)
        costs = estimates(source, list(scanned.listings.values()), options.seed, options.images)
        planned = [
            _task(source, out, split, listing, cost, options)
            for (split, listing), cost in zip(scanned.listings.items(), costs, strict=True)
        ]
        finished = tuple(split for task in planned if (split := _finished(index, task)))
        names = {split.name for split in finished}
        for name in names:  # also where a run was killed between the manifest and this
            shutil.rmtree(work_directory(out, name))
        tasks = tuple(task for task in planned if task.job.split not in names)
        _check_room(out, tasks)
        for task in tasks:
            _resume(out, task)
    finally:
        _remove_unbegun(out)
    to_write = {task.job.split for task in tasks}
    rejected = tuple(file for file in scanned.rejected if file.split in to_write)
    return Begun(Index(out, scanned.classes, index.splits), tasks, finished, rejected)


def _scan(source: Source, out: Path, index: Index, options: WriteOptions, seen: Callable[[], None]) -> Scanned:
    scratch = out / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        scanned = scan(source, scratch, _places(out, index, options.splits), _minival(options), seen)
    finally:
        shutil.rmtree(scratch)
    if missing := set(options.splits) - set(scanned.listings):
        raise UserError(f"the source has no split {_some(sorted(missing))}; it has {_some(sorted(scanned.splits))}")
    for split, listing in scanned.listings.items():
        if not len(listing):
            raise UserError(f"split {split!r} has no image left: all classes are too small for what is cut out")
        _check_classes(index, scanned.classes, split)
    return scanned


def _minival(options: WriteOptions) -> Minival | None:
    return Minival(share(options.minival, "a minival"), options.seed) if options.minival else None


def _places(out: Path, index: Index, wanted: Sequence[str]) -> Callable[[str], Path | None]:
    """Makes the work directory of a split, or none where it is not wanted; never beside shards of unknown origin."""

    def place(split: str) -> Path | None:
        if wanted and split not in wanted:
            return None
        work = work_directory(out, split)
        unknown = [path.name for path in out.iterdir() if re.fullmatch(rf"{re.escape(split)}-\d+\.tar", path.name)]
        if unknown and not _record(work).exists() and split not in [there.name for there in index.splits]:
            raise UserError(
                f"{out} holds {min(unknown)}, which is in no index here and would be overwritten; "
                "move it away or choose another OUT"
            )
        work.mkdir(exist_ok=True)
        return work

    return place


def _task(source: Source, out: Path, split: str, listing: Listing, cost: Estimate, options: WriteOptions) -> Task:
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


def _check_classes(index: Index, classes: tuple[str, ...], split: str) -> None:
    """UserError where labels of a split would be other classes than those of the splits of an index."""
    if index.splits and classes != index.classes:
        missing, extra = sorted(set(index.classes) - set(classes)), sorted(set(classes) - set(index.classes))
        others = f"missing {_some(missing)}; extra {_some(extra)}" if missing or extra else "they are in another order"
        raise UserError(
            f"the classes of {split!r} differ from those of the splits in {index.root}: {others}. "
            "All splits of one OUT share their classes: mend SOURCE or --classes, or choose another OUT."
        )


def _finished(index: Index, task: Task) -> Split | None:
    split = next((split for split in index.splits if split.name == task.job.split), None)
    if split is None:
        return None
    if changes := _changes(split.made_from, task.made_from):
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
    jobs = [task.job for task in tasks]
    there = (path for job in jobs for path in (*out.glob(f"{job.split}-*.tar"), *job.work.iterdir()))
    written, needed = sum(path.stat().st_size for path in there), sum(task.num_bytes for task in tasks)
    free = shutil.disk_usage(out).free
    if needed * _SURELY - written > free:
        raise UserError(
            f"the shards need about {needed:,} bytes ({written:,} are written), and {free:,} are free in {out}. "
            "Make room, choose another OUT, or smaller images (--resize, --quality)."
        )


def _resume(out: Path, task: Task) -> None:
    """Keeps the finished shards of an unfinished run, removes its temporaries; UserError where it was another run."""
    split, record = task.job.split, _record(task.job.work)
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
    remove_temporaries(task.job)


def _record(work: Path) -> Path:
    """From when it is there, the split has been begun."""
    return work / "made_from.json"


def _remove_unbegun(out: Path) -> None:
    """The listings of splits that are not to be written, or that something spoke against."""
    for work in out.glob("*.unfinished"):
        if not _record(work).exists():
            shutil.rmtree(work)


def remove_temporaries(job: Job) -> None:
    """What killed processes left in OUT, which is locked, so that nobody else is writing."""
    for directory in (job.out, job.out / ".nv-meta", job.work):
        for path in directory.glob("*.tmp"):
            if re.fullmatch(r".+\.(tar|idx|npy|json|yaml|gz)\.\d+\.tmp", path.name):
                path.unlink()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_LISTED]) + (f", ... ({len(names)})" if len(names) > _MAX_LISTED else "") or "none"
