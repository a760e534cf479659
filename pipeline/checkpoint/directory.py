"""The checkpoints of a run: saved, found again, loaded."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from pipeline import sharded
from pipeline.checkpoint.behind import Behind
from pipeline.checkpoint.upload import Uploads, check_destination
from pipeline.checkpoint.whole import (
    difference,
    file_names,
    flushed_hash,
    make_empty,
    read_manifest,
    remove,
    seal,
    write_bytes,
)
from pipeline.recipe import Checkpoint
from pipeline.sharded import Shard
from shards.durable import sync_directory
from shards.errors import UserError

T = TypeVar("T")
DIRECTORY = "checkpoints"
LATEST = "latest"
STATE = "state.json"
TEMPORARY = ".tmp"


class Ranks(Protocol):
    """The part of a World that is needed here."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_main(self) -> bool: ...
    @property
    def group(self) -> dist.ProcessGroup | None: ...
    def gather(self, value: object) -> list[object]: ...
    def from_main(self, value: object) -> object: ...
    def goes_on(self) -> None: ...


class Engine(Protocol):
    """The part of a Backend that is needed here."""

    def save_engine(self, directory: Path) -> None: ...
    def stage_engine(self) -> Callable[[Path, dist.ProcessGroup | None], None] | None: ...
    def load_engine(self, directory: Path) -> None: ...


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run directory, of which the newest `keep` stay; every rank calls every method.

    `asynchronous`: what can be copied into memory is written and committed in a thread, one checkpoint at a time, over
    the group of `world`, which nothing else may use then. `uploads` copies what is committed to a store, behind it all.
    """

    root: Path
    world: Ranks
    keep: int
    asynchronous: bool = False
    uploads: Uploads | None = None
    behind: Behind = field(default_factory=Behind)

    @classmethod
    def of(cls, run_dir: Path, world: Ranks, section: Checkpoint) -> "Checkpoints":
        """Those of a run. Raises UserError where they are to be uploaded to where nothing can be written."""
        uploads = Uploads(section.upload) if section.upload else None
        found = cls(run_dir / DIRECTORY, world, section.keep, section.asynchronous, uploads)
        if uploads:
            found._together(lambda: check_destination(uploads.url) if world.is_main else None)
        return found

    def save(self, step: int, engine: Engine, pieces: Mapping[str, list[Shard]], state: dict) -> Path:
        """Commits the state of `step`; older checkpoints are pruned only after that. Asynchronously, it returns when
        the one before is committed and this one copied. pieces: what there is beside the engine, by the name of its
        directory.

        Raises UserError where it, or the one before, cannot be written (the older ones stay whole).
        """
        self.wait()
        own = self._own_files(state | {"step": step})
        staged = engine.stage_engine() if self.asynchronous else None
        write_engine = staged or (lambda directory, group: engine.save_engine(directory))
        if staged:
            pieces = {name: sharded.in_memory(shards) for name, shards in pieces.items()}

        def write(directory: Path) -> None:
            write_engine(directory / "engine", self.world.group)
            for name, shards in pieces.items():
                sharded.save(shards, directory / name, self.world.group)
            self._together(lambda: _write_all(directory, own))

        final = self.root / f"step-{step:08d}"
        if staged:
            self.behind.start(lambda: self._save(final, write))
        else:
            self._save(final, write)
        return final

    def wait(self) -> None:
        """Returns when no commit is under way; raises UserError, on every rank alike, where it failed."""
        self.behind.wait()

    def wait_for_uploads(self) -> None:
        """Returns when what was committed is copied, or given up with a message."""
        if self.uploads:
            self.uploads.wait(self.world.goes_on)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Waits for the commit and the upload that are under way when the body ends, also by an error, which that of a
        commit does not replace."""
        try:
            yield
            self.wait()
        except BaseException:
            try:
                self.wait()
            except Exception as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
            raise
        finally:
            self.wait_for_uploads()

    def newest(self) -> Path | None:
        """The newest committed checkpoint whose files are what the manifest says; what is not whole is named.

        Raises UserError where there are some and none is whole: to begin anew would throw the run's record away.
        """
        names = self.world.from_main(sorted((path.name for path in self.root.glob("step-*[0-9]")), reverse=True))
        damaged: list[str] = []
        for name in names:  # type: ignore[attr-defined]
            found = self._why_not_whole(self.root / name)
            if not found:
                return self.root / name
            damaged.append(f"{name}: {found}")
            if self.world.is_main:
                print(f"checkpoint {name} is not whole ({found}): ignored, an older one is tried", flush=True)
        if damaged:
            raise UserError(
                f"none of the {len(damaged)} checkpoints in {self.root} is whole ({damaged[0]}): put one that is there "
                "from a copy, or begin anew in another --run-dir (or here, once that directory is removed)"
            )
        return None

    def load(self, path: Path, engine: Engine, pieces: Mapping[str, list[Shard]]) -> None:
        """Reads a checkpoint that `newest` gave into the engine, the pieces and this rank's RNG."""
        engine.load_engine(path / "engine")
        for name, shards in pieces.items():
            sharded.load(shards, path / name)
        rng = path / _rng_name(self.world.rank)
        if rng.exists():
            _set_rng(load_file(rng))

    def _own_files(self, state: dict) -> dict[str, bytes]:
        """Name -> content of what this rank alone has to say."""
        files = {_rng_name(self.world.rank): as_safetensors(_get_rng())}
        return files | ({STATE: json.dumps(state, indent=1).encode()} if self.world.is_main else {})

    def _save(self, final: Path, write: Callable[[Path], None]) -> None:
        temporary = final.with_name(final.name + TEMPORARY)
        try:
            self._together(lambda: make_empty(temporary) if self.world.is_main else None)
            write(temporary)
            hashes = self._hash(temporary)
            self._together(lambda: self._commit(temporary, final, hashes) if self.world.is_main else None)
        except (OSError, UserError, CheckpointException) as error:
            raise UserError(
                f"the checkpoint of step {int(final.name.removeprefix('step-'))} cannot be written to {self.root} "
                f"({error}): the older checkpoints are whole; free space or permissions there and start again, the run "
                "resumes from the newest of them"
            ) from error

    def _hash(self, directory: Path) -> dict[str, dict]:
        """Size and hash of every file below, flushed to the disk; the ranks share the work."""
        names = self.world.from_main(file_names(directory))
        mine = names[self.world.rank :: self.world.size]  # type: ignore[index]
        parts = self._together(lambda: {name: flushed_hash(directory / name) for name in mine})
        return {name: entry for part in parts for name, entry in part.items()}

    def _commit(self, temporary: Path, final: Path, hashes: dict[str, dict]) -> None:
        seal(temporary, hashes)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync_directory(self.root)
        write_bytes(self.root / LATEST, final.name.encode())
        if self.uploads:
            self.uploads.add(final)
        self._prune(final)

    def _prune(self, final: Path) -> None:
        """Removes all but the newest `keep` up to `final` (a later one is not whole, or the run would have resumed from
        it), and what an interrupted save left; what is being uploaded goes next time."""
        older = sorted(path for path in self.root.glob("step-*[0-9]") if path <= final)[: -self.keep]
        needed = [path for path in older if self.uploads and self.uploads.holds(path)]
        remove([*(path for path in older if path not in needed), *self.root.glob("step-*" + TEMPORARY)])

    def _why_not_whole(self, path: Path) -> str:
        manifest = self.world.from_main(read_manifest(path))
        if isinstance(manifest, str):
            return manifest
        names = sorted(manifest)  # type: ignore[call-overload]
        mine = names[self.world.rank :: self.world.size]
        found = [difference(path, name, manifest[name]) for name in mine]  # type: ignore[index]
        everyone = [text for part in self.world.gather(found) for text in part if text]  # type: ignore[attr-defined]
        return "; ".join(everyone[:3])

    def _together(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on each rank; where it fails on one it fails on all, so that none waits for another."""
        found: T | Exception
        try:
            found = work()
        except (OSError, UserError) as error:
            found = error
        everyone = self.world.gather(found)
        failed = [outcome for outcome in everyone if isinstance(outcome, Exception)]
        if failed:
            raise failed[0]
        return everyone  # type: ignore[return-value]


def is_checkpoint(path: Path) -> bool:
    """Whether it is the directory of one, by its name; nothing is said about what is in it."""
    return path.is_dir() and path.name.startswith("step-")


def read_state(path: Path) -> dict:
    return json.loads((path / STATE).read_text())


def saved_step(run_dir: Path) -> int:
    """Of the checkpoint that a run has committed last; 0 where there is none."""
    latest = run_dir / DIRECTORY / LATEST
    return int(latest.read_text().removeprefix("step-")) if latest.exists() else 0


def has_checkpoints(run_dir: Path) -> bool:
    """Whether a run has committed any that is still there, whole or not."""
    return any((run_dir / DIRECTORY).glob("step-*[0-9]"))


def _write_all(directory: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        write_bytes(directory / name, content)


def _rng_name(rank: int) -> str:
    return f"rng-rank-{rank}.safetensors"


def _get_rng() -> dict[str, Tensor]:
    """What the trainer's process draws from; all other draws are keyed and need no state."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def _set_rng(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
