"""One state on disk: written aside, flushed, hashed, committed by a rename; only what is whole is ever loaded.

`RUN/checkpoints/step-00000100/` holds `engine/` (the backend's files), `ema/`, one `rng-rank-N.safetensors` a rank,
`state.json`, `manifest.json` (size and SHA-256 of each file) and `COMMITTED` (the manifest's own hash).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from pipeline import sharded
from pipeline.sharded import Shard
from shards.durable import atomic_file, sync_directory
from shards.errors import UserError

MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"
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
    def barrier(self) -> None: ...
    def gather(self, value: object) -> list[object]: ...
    def from_main(self, value: object) -> object: ...


class Engine(Protocol):
    """The part of a Backend that is needed here."""

    def save_engine(self, directory: Path) -> None: ...
    def load_engine(self, directory: Path) -> None: ...


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run directory, of which the newest `keep` stay; every rank calls every method."""

    root: Path
    world: Ranks
    keep: int

    def save(self, step: int, engine: Engine, averages: list[Shard], state: dict) -> Path:
        """Commits the state of `step`; older checkpoints are pruned only after that.

        Raises UserError where it cannot be written (the older ones stay whole).
        """
        final = self.root / f"step-{step:08d}"
        temporary = final.with_name(final.name + TEMPORARY)
        try:
            self._on_main(lambda: _make_empty(temporary))
            self._write(temporary, engine, averages, state | {"step": step})
            hashes = self._hash(temporary)
            self._on_main(lambda: self._commit(temporary, final, hashes))
        except (OSError, UserError, CheckpointException) as error:
            raise UserError(
                f"the checkpoint of step {step} cannot be written to {self.root} ({error}): the older checkpoints are "
                "whole; free space or permissions there and start again, the run resumes from the newest of them"
            ) from error
        return final

    def newest(self) -> Path | None:
        """The newest committed checkpoint whose files are what the manifest says; what is not whole is named."""
        names = self.world.from_main(sorted((path.name for path in self.root.glob("step-*[0-9]")), reverse=True))
        for name in names:  # type: ignore[attr-defined]
            found = self._why_not_whole(self.root / name)
            if not found:
                return self.root / name
            if self.world.is_main:
                print(f"checkpoint {name} is not whole ({found}): ignored, an older one is tried", flush=True)
        return None

    def load(self, path: Path, engine: Engine, averages: list[Shard]) -> None:
        """Reads a checkpoint that `newest` gave into the engine, the averages and this rank's RNG."""
        engine.load_engine(path / "engine")
        if averages:
            sharded.load(averages, path / "ema")
        rng = path / _rng_name(self.world.rank)
        if rng.exists():
            _set_rng(load_file(rng))

    def _write(self, directory: Path, engine: Engine, averages: list[Shard], state: dict) -> None:
        engine.save_engine(directory / "engine")
        if averages:
            sharded.save(averages, directory / "ema")
        save_file(_get_rng(), directory / _rng_name(self.world.rank))
        if self.world.is_main:
            (directory / STATE).write_text(json.dumps(state, indent=1))
        self.world.barrier()

    def _hash(self, directory: Path) -> dict[str, dict]:
        """Size and hash of every file below, flushed to the disk; the ranks share the work."""
        names = self.world.from_main(sorted(_names(directory)))
        mine = names[self.world.rank :: self.world.size]  # type: ignore[index]
        parts = self.world.gather({name: _flushed_hash(directory / name) for name in mine})
        return {name: entry for part in parts for name, entry in part.items()}  # type: ignore[attr-defined]

    def _commit(self, temporary: Path, final: Path, hashes: dict[str, dict]) -> None:
        manifest = json.dumps(hashes, indent=1, sort_keys=True)
        _write_text(temporary / MANIFEST, manifest)
        _write_text(temporary / COMMITTED, _sha256(manifest))
        for directory in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
            sync_directory(directory)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync_directory(self.root)
        _write_text(self.root / LATEST, final.name)
        self._prune(final)

    def _prune(self, final: Path) -> None:
        """Removes all but the newest `keep` up to `final` (a later one is not whole, or the run would have resumed from
        it), and what an interrupted save left. COMMITTED goes first, so a half-removed one is never loaded."""
        committed = sorted(path for path in self.root.glob("step-*[0-9]") if path <= final)
        for path in [*committed[: -self.keep], *self.root.glob("step-*" + TEMPORARY)]:
            (path / COMMITTED).unlink(missing_ok=True)
            shutil.rmtree(path)

    def _why_not_whole(self, path: Path) -> str:
        manifest = self.world.from_main(_read_manifest(path))
        if isinstance(manifest, str):
            return manifest
        names = sorted(manifest)  # type: ignore[call-overload]
        mine = names[self.world.rank :: self.world.size]
        found = [_difference(path, name, manifest[name]) for name in mine]  # type: ignore[index]
        everyone = [text for part in self.world.gather(found) for text in part if text]  # type: ignore[attr-defined]
        return "; ".join(everyone[:3])

    def _on_main(self, work: Callable[[], None]) -> None:
        """Runs `work` on rank 0; where it fails, it fails on every rank, so that none waits for another."""
        error: Exception | None = None
        if self.world.is_main:
            try:
                work()
            except (OSError, UserError) as caught:
                error = caught
        error = self.world.from_main(error)  # type: ignore[assignment]
        if error is not None:
            raise error


def read_state(path: Path) -> dict:
    return json.loads((path / STATE).read_text())


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _names(directory: Path) -> Iterable[str]:
    return (str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def _read_manifest(path: Path) -> dict | str:
    """The manifest, or why it cannot be trusted."""
    try:
        text, committed = (path / MANIFEST).read_text(), (path / COMMITTED).read_text()
        return json.loads(text) if committed == _sha256(text) else f"{COMMITTED} does not match {MANIFEST}"
    except (OSError, ValueError) as error:
        return f"not committed: {error}"


def _difference(path: Path, name: str, entry: dict) -> str:
    try:
        with (path / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{name}: {error}"
    return "" if digest == entry["sha256"] else f"{name}: its SHA-256 is not the manifest's"


def _flushed_hash(path: Path) -> dict:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
