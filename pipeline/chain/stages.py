"""What a chain is made of. A stage knows its work, what decides the result, and what it leaves; not where it stands in
the chain, nor whether its work is due.

The graph of a chain is `start_from`: the earlier stage whose weights a stage starts from. Many may start from one.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from pipeline.backend import World
from pipeline.chain.records import sha256_of
from pipeline.checkpoint import has_checkpoints
from pipeline.export import Formats, Licences, find, write
from pipeline.export.formats import check_onnx_installed
from pipeline.models.build import make_model
from pipeline.models.load import check_start
from pipeline.prepare import check
from pipeline.recipe import Recipe
from pipeline.record import decisive_fields, weights_path, write_outcome
from pipeline.trainer import fit
from shards.errors import UserError
from shards.index import Index
from shards.store import StoreOptions, open_data

VARIANTS = ("model", "ema", "best_model", "best_ema")


class Stage(Protocol):
    """`start_from` names an earlier stage, "" none; `weights` which of its weights ("" the average, where it has one);
    `directory` where it works, below the chain's."""

    kind: ClassVar[str]

    @property
    def name(self) -> str: ...
    @property
    def start_from(self) -> str: ...
    @property
    def weights(self) -> str: ...
    @property
    def directory(self) -> str: ...
    @property
    def dry_run(self) -> bool: ...
    def check(self, world: World, source: "Stage | None") -> None:
        """Raises UserError for what can be seen not to work before anything begins; `source`: the stage that this one
        starts from, whose weights may be yet to come."""
        ...

    def inputs(self) -> dict[str, object]:
        """What decides the result, by names that a user knows, but for what an earlier stage hands over."""
        ...

    def sources(self) -> dict[str, Any]:
        """What the inputs were made from, as provenance keeps it."""
        ...

    def has_state(self, directory: Path) -> bool:
        """Whether there is unfinished work in the directory that would be lost."""
        ...

    def work(self, directory: Path, start: Path | None, world: World) -> str:
        """Does it, or goes on with it: "done", or "requeue" when it was stopped. `start`: the weights handed over."""
        ...

    def outputs(self, directory: Path) -> list[Path]:
        """The files that a finished stage has left."""
        ...

    def hands_over(self, directory: Path, variant: str) -> Path:
        """The file of weights that a stage which starts from this one gets, below `directory`; variant "": the average,
        or raw where none is kept. Raises UserError where the stage leaves no such weights."""
        ...


@dataclass(frozen=True)
class Train:
    """Trains a recipe, whose `run_dir` is the directory below the chain's, with new heads on what is handed over."""

    kind: ClassVar[str] = "train"
    name: str
    recipe: Recipe
    start_from: str = ""
    weights: str = ""

    def __post_init__(self) -> None:
        """Raises UserError where it would start from two things."""
        if self.start_from and self.recipe.model.start:
            raise UserError(
                f"stage '{self.name}' starts from stage '{self.start_from}', but its model.start names "
                f"{self.recipe.model.start}: only one can be; leave model.start empty, or run that recipe on its own"
            )

    @property
    def directory(self) -> str:
        return self.recipe.run_dir

    @property
    def dry_run(self) -> bool:
        return self.recipe.dry_run

    def check(self, world: World, source: Stage | None) -> None:
        check(self.recipe, world)
        if isinstance(source, Train):
            with torch.device("meta"):
                own, earlier = make_model(self.recipe, 1), make_model(source.recipe, 1)
            check_start(own, earlier, f"stage {self.name} cannot start from what stage {source.name} leaves: it")

    def inputs(self) -> dict[str, object]:
        model, index = self.recipe.model, self._index()
        files = {"model.start": model.start, "model.init_weights": model.init_weights}
        found = decisive_fields(self.recipe)
        found |= {f"file of {name}": sha256_of(Path(path)) for name, path in files.items() if path}
        data = {f"data of {split}": index.fingerprint(split) for split in self._splits()}
        return found | data

    def sources(self) -> dict[str, Any]:
        index = self._index()
        return {"data": self.recipe.data.path, "splits": {name: hashes(index, name) for name in self._splits()}}

    def has_state(self, directory: Path) -> bool:
        return has_checkpoints(directory)

    def work(self, directory: Path, start: Path | None, world: World) -> str:
        model = dataclasses.replace(self.recipe.model, start=str(start)) if start else self.recipe.model
        return fit(dataclasses.replace(self.recipe, run_dir=str(directory), model=model), world)

    def outputs(self, directory: Path) -> list[Path]:
        return sorted((directory / "weights").glob("*.safetensors"))

    def hands_over(self, directory: Path, variant: str) -> Path:
        averaged = bool(self.recipe.ema_decay)
        if variant not in ("", *VARIANTS):
            raise UserError(f"stage '{self.name}' has no weights '{variant}' to hand over: give one of {[*VARIANTS]}")
        if variant.endswith("ema") and not averaged:
            raise UserError(
                f"stage '{self.name}' keeps no average (ema_decay 0) to hand over: hand its model over, or keep one"
            )
        return weights_path(directory, variant or ("ema" if averaged else "model"))

    def _splits(self) -> tuple[str, str]:
        return self.recipe.data.train, self.recipe.data.val

    def _index(self) -> Index:
        data = self.recipe.data
        return open_data(data.path, StoreOptions(data.remote, data.cache, data.cache_size))[0]


@dataclass(frozen=True)
class Exporting:
    """How trained weights are exported; see tools/export.py."""

    onnx: bool = False
    """Also model.onnx."""
    torch_export: bool = False
    """Also model.pt2, a program of torch.export."""
    licence: str = "unknown"
    """Of these weights, for the model card."""
    data_licence: str = "unknown"
    """Of the data they were trained on."""
    start_licence: str = "unknown"
    """Of the weights they started from."""


@dataclass(frozen=True)
class Export:
    """Writes what is handed over in timm's layout, into `timm` below its directory; rank 0 does it."""

    kind: ClassVar[str] = "export"
    OUT: ClassVar[str] = "timm"
    name: str
    start_from: str
    options: Exporting = field(default_factory=Exporting)
    weights: str = ""
    dry_run: ClassVar[bool] = False

    @property
    def directory(self) -> str:
        return self.name

    def check(self, world: World, source: Stage | None) -> None:
        if self.options.onnx:
            check_onnx_installed()

    def inputs(self) -> dict[str, object]:
        return {f"export.{name}": value for name, value in vars(self.options).items()}

    def sources(self) -> dict[str, Any]:
        return {}

    def has_state(self, directory: Path) -> bool:
        return False

    def work(self, directory: Path, start: Path | None, world: World) -> str:
        world.place.at(f"exporting {start}")
        world.on_main(lambda: self._write(directory, start))
        return "done"

    def outputs(self, directory: Path) -> list[Path]:
        return sorted(path for path in (directory / self.OUT).iterdir() if path.is_file())

    def hands_over(self, directory: Path, variant: str) -> Path:
        raise UserError(f"stage '{self.name}' of kind {self.kind} hands no weights over: start from one that trains")

    def _write(self, directory: Path, start: Path | None) -> None:
        assert start is not None
        options = self.options
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(directory / self.OUT, ignore_errors=True)  # of an attempt that was killed before it was noted
        licences = Licences(options.licence, options.data_licence, options.start_licence)
        formats = Formats(options.onnx, options.torch_export)
        differences = write(find(start), directory / self.OUT, formats, licences)
        worst = max(differences.values())
        write_outcome(directory, "done", 0, f"wrote {', '.join(differences)}; logits within {worst:.1e} of the model's")


def hashes(index: Index, name: str) -> dict[str, Any]:
    """What a split is made of, down to each shard."""
    split = index.split(name)
    return {
        "fingerprint": index.fingerprint(name),
        "num_samples": split.num_samples,
        "offsets_sha256": split.offsets_sha256,
        "shards": {shard.name: shard.sha256 for shard in split.shards},
    }


def check_graph(stages: Sequence[Stage]) -> None:
    """Raises UserError where names or directories occur twice, or a stage starts from one that is not before it."""
    before: dict[str, Stage] = {}
    for stage in stages:
        if stage.name in before or stage.directory in {other.directory for other in before.values()}:
            raise UserError(
                f"two stages of the chain are called '{stage.name}' or work in '{stage.directory}': give each a name "
                "and a run_dir of its own"
            )
        if stage.start_from and stage.start_from not in before:
            raise UserError(
                f"stage '{stage.name}' starts from '{stage.start_from}', but before it come only {list(before)}: "
                "name one of those, or put the stage later"
            )
        if stage.start_from:
            before[stage.start_from].hands_over(Path(), stage.weights)
        before[stage.name] = stage
