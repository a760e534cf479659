"""Samples to byte-reproducible WebDataset tars: the same images, seed and options give the same files, whatever the
images came in and however many processes wrote them.

Shards appear one by one, each whole; the offsets and the manifest come last, so an unfinished split never loads. A run
that was ended is taken up by the next one with the same source and options: finished shards stay.
"""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.budget import Budget
from shards.durable import atomic_file, explained, locked
from shards.engine import Engine
from shards.errors import UserError
from shards.index import Shard, Split, offsets_name, write_manifest, write_offsets
from shards.progress import Progress
from shards.sources.base import Rejected, Source
from shards.writing.begin import SCRATCH, Begun, Task, begin, existing_index, remove_temporaries
from shards.writing.in_place import write_shard
from shards.writing.options import WriteOptions
from shards.writing.parts import forget_losses, offsets_path, read_part
from shards.writing.sidecars import write_sidecars
from shards.writing.spool import fill_spools, shuffle_spool

_MAX_LISTED = 20


@dataclass(frozen=True)
class Written:
    """A finished split; `already_complete` where it was there before and nothing was written."""

    split: Split
    already_complete: bool


def write(source: Source, out: Path, options: WriteOptions, engine: Engine) -> tuple[Written, ...]:
    """Writes the splits of a source into OUT, beside those it may hold.

    A split with the same source and options is left as it is. UserError for more bad files than the budget, a full
    disk, another writer in OUT, and all that `begin` finds against it.
    """
    options.images.check_tools()
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            with Progress("listing") as progress:
                begun = begin(source, out, existing_index(out), options, progress.advance)
            _write_shards(begun, options, engine)
            return *(Written(split, True) for split in begun.finished), *(Written(s, False) for s in _publish(begun))


def plan(source: Source, out: Path, options: WriteOptions) -> Begun:
    """What `write` would write, without a trace in OUT but for the names of a gzip archive; the same UserErrors."""
    options.images.check_tools()
    with explained(out):
        rehearsal = out / SCRATCH
        rehearsal.mkdir(parents=True, exist_ok=True)
        try:
            with locked(out), Progress("listing") as progress:
                return begin(source, rehearsal, existing_index(out), options, progress.advance)
        finally:
            shutil.rmtree(rehearsal)


class _Losses:
    """The files that are left out, held against the budget."""

    def __init__(self, budget: str, num_files: int) -> None:
        self._budget, self._num_files = budget, num_files
        self._allowed = Budget(budget).allows(num_files)
        self._files: dict[Rejected, None] = {}

    def add(self, *files: Rejected) -> None:
        """Counts files that it has not heard of; UserError once there are so many too many that more help nobody."""
        self._files.update(dict.fromkeys(files))
        self.check(self._allowed + _MAX_LISTED)

    def check(self, allowed: int | None = None) -> None:
        """UserError where the budget is exceeded."""
        if len(self._files) <= (self._allowed if allowed is None else allowed):
            return
        listed = "\n  ".join(f"{file.where}: {file.reason}" for file in list(self._files)[:_MAX_LISTED])
        raise UserError(
            f"{len(self._files)} of {self._num_files} files cannot be samples, and the budget of {self._budget} allows "
            f"{self._allowed}. Replace or remove them, or raise --max-bad, then run again:\n  {listed}"
        )


def _write_shards(begun: Begun, options: WriteOptions, engine: Engine) -> None:
    jobs = [task.job for task in begun.tasks]
    shards = [(job, number) for job in jobs for number in range(job.num_shards)]
    parts = {shard: part for shard in shards if (part := read_part(*shard))}
    num_images = sum(job.num_images for job in jobs)
    done = sum(part.shard.num_samples + len(part.dropped) for part in parts.values())
    losses = _Losses(options.max_bad, num_images + len(begun.rejected))
    losses.add(*begun.rejected)
    losses.check()
    try:
        losses.add(*(file for part in parts.values() for file in part.dropped))
        write_one = write_shard
        if jobs and (options.in_order or jobs[0].source.in_order):
            write_one = shuffle_spool
            with Progress("reading", num_images, initial=done) as progress:
                fill_spools(jobs, engine, progress.advance, losses.add)
        with Progress("writing", num_images, initial=done) as progress:
            for part in engine.run(write_one, [shard for shard in shards if shard not in parts], progress.advance):
                losses.add(*part.dropped)
        losses.check()
    except UserError:
        # What could not be read now may be mended, and is tried again by the next run.
        for shard in shards:
            forget_losses(*shard)
        raise
    finally:
        for job in jobs:
            remove_temporaries(job)


def _publish(begun: Begun) -> tuple[Split, ...]:
    """Offsets, reports and sidecars, then the manifest that makes the splits exist."""
    if not begun.tasks:
        return ()
    splits = tuple(_finish(task, begun.rejected) for task in begun.tasks)
    index = dataclasses.replace(begun.index, splits=(*begun.index.splits, *splits))
    write_sidecars(index)
    write_manifest(index)
    for task in begun.tasks:
        shutil.rmtree(task.job.work)
    return splits


def _finish(task: Task, rejected: Sequence[Rejected]) -> Split:
    job = task.job
    shards: list[Shard] = []
    dropped = [file for file in rejected if file.split == job.split]
    changes: Counter[str] = Counter()
    changed = 0
    for number in range(job.num_shards):
        part = read_part(job, number)
        assert part is not None  # every shard was written
        shards.append(part.shard)
        dropped.extend(part.dropped)
        changes.update(part.changes)
        changed += part.num_changed
    num_samples = sum(shard.num_samples for shard in shards)
    report = {
        "written": num_samples,
        "changed": changed,
        "changes": dict(changes),
        "dropped": len(dropped),
        "files": [{"file": file.where, "reason": file.reason} for file in dropped],
    }
    with atomic_file(report_path(job.out, job.split)) as file:
        file.write((json.dumps(report, indent=1, sort_keys=True) + "\n").encode())
    rows = (np.load(offsets_path(job.work, number), allow_pickle=False) for number in range(job.num_shards))
    sha256 = write_offsets(job.out / offsets_name(job.split), num_samples, rows)
    return Split(job.split, tuple(shards), sha256, task.made_from)


def report_path(out: Path, split: str) -> Path:
    """What was changed in a split's images, and which files are not in it and why."""
    return out / f"{split}.report.json"


def read_report(out: Path, split: str) -> dict[str, Any]:
    """The report of a finished split."""
    with explained(out):
        return json.loads(report_path(out, split).read_bytes())
