"""Bad samples of a run: named in a file, counted over all ranks, bounded by a budget."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.backend.world import World
from pipeline.data.batch import Batch
from shards.durable import replace_text
from shards.errors import UserError

QUARANTINE = "quarantine.jsonl"
_MAX_LISTED = 20


class Quarantine:
    """RUN/quarantine.jsonl: a line for every bad sample that the run met, written by rank 0.

    Each rank notes what it meets; the counts travel with the stop flag. The budget is on different samples of the
    training split, over the whole run.
    """

    def __init__(self, run_dir: Path, world: World, split: str, budget: int) -> None:
        self._path, self._world, self._split, self._budget = run_dir / QUARANTINE, world, split, budget
        self._lines: dict[tuple[str, int], dict[str, Any]] = {}
        self._new: dict[tuple[str, int], dict[str, Any]] = {}

    def resume(self, step: int) -> None:
        """Takes up what was met up to `step`; what came later will be met again."""
        lines = _read(self._path) if self._world.is_main else []
        kept = self._world.from_main([line for line in lines if line["step"] <= step])
        self._lines = {_identity(line): line for line in kept}
        if len(lines) > len(self._lines):
            self._write()

    def watch(self, batches: Iterable[Batch], step: int) -> Iterator[Batch]:
        """The batches, each noted as it passes."""
        for batch in batches:
            self.note([batch], step)
            yield batch

    def note(self, batches: Iterable[Batch], step: int) -> None:
        """What this rank met for the batches of `step`."""
        for error, substitute in (bad for batch in batches for bad in batch.bad):
            line = {"step": step, "split": error.split, "sample": error.sample, "shard": error.shard, "key": error.key}
            line |= {"reason": error.reason, "substitute": substitute if substitute >= 0 else None}
            if _identity(line) not in self._lines:
                self._new.setdefault(_identity(line), line)

    def poll(self) -> bool:
        """Whether any rank was signalled to stop. To be called on all ranks: what they met since is exchanged.

        Raises UserError, on all ranks, where more samples of the training split are bad than the budget allows.
        """
        stopping, num_new = self._world.poll(len(self._new))
        if num_new:
            self._share()
        return stopping

    def _share(self) -> None:
        for lines in self._world.gather(list(self._new.values())):
            self._lines |= {_identity(line): line for line in lines}
        self._new.clear()
        if self._world.is_main:
            self._write()
        self._check()

    def _check(self) -> None:
        bad = [line for (split, _), line in self._lines.items() if split == self._split]
        if len(bad) <= self._budget:
            return
        listed = "\n".join(f"  - {line['shard']}: {line['key']}: {line['reason']}" for line in bad[:_MAX_LISTED])
        raise UserError(
            f"{len(bad)} samples of split {self._split!r} are bad, and data.max_bad allows {self._budget}; all are in "
            f"{self._path}:\n{listed}\nmend the shards (tools/check_shards.py finds what else is wrong), or give a "
            "larger --data.max-bad, and start the same command again"
        )

    def _write(self) -> None:
        replace_text(self._path, "".join(json.dumps(line) + "\n" for line in self._lines.values()))


def _identity(line: dict[str, Any]) -> tuple[str, int]:
    return line["split"], line["sample"]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
