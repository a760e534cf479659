"""The stage that evaluates."""

import dataclasses
import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pipeline.backend import World
from pipeline.chain.records import sha256_of
from pipeline.chain.stage import OfWeights, Stage, hashes
from pipeline.data.loading import serve_workers
from pipeline.predict.checkpoint import Checkpoint
from pipeline.predict.evaluation import Scores, Settings, evaluate, is_class_folders, open_images
from pipeline.predict.find import load_variants
from pipeline.record import write_outcome
from shards.durable import replace_text
from shards.files_reader import read_folders
from shards.index import Index
from shards.store import StoreOptions, open_data

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Evaluating:
    """What finished weights are evaluated on; see tools/evaluate.py."""

    data: str = ""
    """Shards, by their directory or URL, or a directory of class folders; empty: what the stage before evaluated on."""
    split: str = ""
    """Of shards; empty: the one that the stage before evaluated on, or, of other data, val."""
    remote: Literal["", "cache", "range"] = ""
    """Data at a URL: whole shards on a local disk, or a range a sample; empty: as the stage before reads its own."""
    cache: str = ""
    """Directory on a local disk for what is fetched from a URL; empty: that of the stage before."""
    cache_size: str = ""
    """Most bytes of shards in the cache; empty: as of the stage before."""
    real: str = ""
    """ReaL's real.json, for its top-1 as well."""
    batch: int = 256
    """Images of a forward pass of a rank."""
    workers: int = 2
    """Processes a rank that decode."""


@dataclass(frozen=True)
class Evaluate(OfWeights):
    """Evaluates what is handed over, all ranks together, into evaluation.json below its directory."""

    kind: ClassVar[str] = "evaluate"
    options: Evaluating = field(default_factory=Evaluating)

    def check(self, world: World, source: Stage | None) -> None:
        """Its data is read when it is decided what is due, by rank 0 alone."""

    def inputs(self) -> dict[str, object]:
        options = self.options
        real = sha256_of(Path(options.real)) if options.real else None
        found: dict[str, object] = {"evaluate.split": options.split, "file of evaluate.real": real}
        if is_class_folders(options.data):
            return found | {"data of the class folders": _names_and_sizes(options.data)}
        return found | {f"data of {self._split()}": self._index().fingerprint(self._split())}

    def sources(self) -> dict[str, Any]:
        if is_class_folders(self.options.data):
            return {"data": self.options.data}
        return {"data": self.options.data, "splits": {self._split(): hashes(self._index(), self._split())}}

    def work(self, directory: Path, start: Path | None, world: World) -> str:
        assert start is not None
        began = time.monotonic()
        world.place.at(f"evaluating {start}")
        if self.options.workers:
            serve_workers()
        variants = load_variants(start)
        asked = variants[""]
        # The split whose fingerprint is kept.
        split = self.options.split if is_class_folders(self.options.data) else self._split()
        images = open_images(self.options.data, split, asked, self._store())
        scores = evaluate(variants, images, self._settings(asked), world)
        if scores is None:
            return "requeue"
        world.on_main(lambda: self._write(directory, start, scores, time.monotonic() - began))
        return "done"

    def outputs(self, directory: Path) -> list[Path]:
        return [directory / EVALUATION]

    def _settings(self, asked: Checkpoint) -> Settings:
        real = Path(self.options.real) if self.options.real else None
        own = Settings.of(asked.recipe, self.options.workers)
        return dataclasses.replace(own, batch=self.options.batch, real=real)

    def _write(self, directory: Path, start: Path, scores: Scores, seconds: float) -> None:
        facts = {"weights": str(start), "data": self.options.data, "samples": scores.num_samples}
        found = {**facts, "classes": scores.classes, "matched_by": scores.matched, **scores.values}
        directory.mkdir(parents=True, exist_ok=True)
        replace_text(directory / EVALUATION, json.dumps(found, indent=1) + "\n")
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.values.items() if name.endswith("top1"))
        print(f"stage {self.name}: {scores.num_samples:,} images: {shown}", flush=True)
        reason = f"evaluated on {scores.num_samples} images: {shown}"
        write_outcome(directory, "done", 0, reason, seconds=seconds)

    def _split(self) -> str:
        return self.options.split or "val"

    def _store(self) -> StoreOptions:
        asked = {name: getattr(self.options, name) for name in ("remote", "cache", "cache_size")}
        return StoreOptions(**{name: value for name, value in asked.items() if value})

    def _index(self) -> Index:
        return open_data(self.options.data, self._store())[0]


def _names_and_sizes(folders: str) -> str:
    """A fingerprint of the files in class folders."""
    found = [[os.path.relpath(path, folders), os.path.getsize(path)] for path in read_folders(folders)[0].paths]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]
