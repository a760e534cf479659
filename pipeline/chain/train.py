"""The stage that trains."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from pipeline.backend import World
from pipeline.chain.records import sha256_of
from pipeline.chain.stage import Stage, hashes
from pipeline.checkpoint import has_checkpoints
from pipeline.models.build import make_model
from pipeline.models.load import check_start
from pipeline.prepare import check
from pipeline.recipe import Recipe
from pipeline.record import WEIGHTS, decisive_fields, read_recipe, weights_path
from pipeline.trainer import fit
from shards.errors import UserError
from shards.index import Index
from shards.store import StoreOptions, open_data


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
        path = str(start) if start else self.recipe.model.start
        if start and self.has_state(directory):  # the hash of the weights was compared; the chain may have been moved
            path = read_recipe(directory).model.start
        model = dataclasses.replace(self.recipe.model, start=path)
        return fit(dataclasses.replace(self.recipe, run_dir=str(directory), model=model), world)

    def outputs(self, directory: Path) -> list[Path]:
        return sorted((directory / "weights").glob("*.safetensors"))

    def hands_over(self, directory: Path, variant: str) -> Path:
        averaged = bool(self.recipe.ema_decay)
        if variant not in ("", *WEIGHTS):
            raise UserError(f"stage '{self.name}' has no weights '{variant}' to hand over: give one of {[*WEIGHTS]}")
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
