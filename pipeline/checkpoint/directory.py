"""The checkpoints of a run: saved, found again, loaded."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

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
from shards.durable import sync_directory
from shards.errors import UserError

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

    def save(self, step: int, engine: Engine, averages: dict[str, Tensor], state: dict) -> Path:
        """Commits the state of `step`; older checkpoints are pruned only after that.

        Raises UserError where it cannot be written (the older ones stay whole).
        """
        final = self.root / f"step-{step:08d}"
        temporary = final.with_name(final.name + TEMPORARY)
        try:
            self._on_main(lambda: make_empty(temporary))
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

    def load(self, path: Path, engine: Engine, averages: dict[str, Tensor]) -> None:
        """Reads a checkpoint that `newest` gave into the engine, the averages and this rank's RNG."""
        engine.load_engine(path / "engine")
        if averages:
            dcp.load({"ema": averages}, checkpoint_id=path / "ema")
        rng = path / _rng_name(self.world.rank)
        if rng.exists():
            _set_rng(load_file(rng))

    def _write(self, directory: Path, engine: Engine, averages: dict[str, Tensor], state: dict) -> None:
        engine.save_engine(directory / "engine")
        if averages:
            dcp.save({"ema": averages}, checkpoint_id=directory / "ema")
        save_file(_get_rng(), directory / _rng_name(self.world.rank))
        if self.world.is_main:
            (directory / STATE).write_text(json.dumps(state, indent=1))
        self.world.barrier()

    def _hash(self, directory: Path) -> dict[str, dict]:
        """Size and hash of every file below, flushed to the disk; the ranks share the work."""
        names = self.world.from_main(file_names(directory))
        mine = names[self.world.rank :: self.world.size]  # type: ignore[index]
        parts = self.world.gather({name: flushed_hash(directory / name) for name in mine})
        return {name: entry for part in parts for name, entry in part.items()}  # type: ignore[attr-defined]

    def _commit(self, temporary: Path, final: Path, hashes: dict[str, dict]) -> None:
        seal(temporary, hashes)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync_directory(self.root)
        write_bytes(self.root / LATEST, final.name.encode())
        self._prune(final)

    def _prune(self, final: Path) -> None:
        """Removes all but the newest `keep` up to `final` (a later one is not whole, or the run would have resumed from
        it), and what an interrupted save left."""
        committed = sorted(path for path in self.root.glob("step-*[0-9]") if path <= final)
        remove([*committed[: -self.keep], *self.root.glob("step-*" + TEMPORARY)])

    def _why_not_whole(self, path: Path) -> str:
        manifest = self.world.from_main(read_manifest(path))
        if isinstance(manifest, str):
            return manifest
        names = sorted(manifest)  # type: ignore[call-overload]
        mine = names[self.world.rank :: self.world.size]
        found = [difference(path, name, manifest[name]) for name in mine]  # type: ignore[index]
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
