"""What a chain is made of. A stage knows its work, what decides the result, and what it leaves; not where it stands in
the chain, nor whether its work is due.

The graph of a chain is `start_from`: the earlier stage whose weights a stage starts from. Many may start from one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pipeline.backend import World
from shards.errors import UserError
from shards.index import Index


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
class OfWeights:
    """A stage, but for its work, that only looks at what is handed over: it works in a directory of its own name, keeps
    nothing while it is unfinished, and hands nothing over."""

    kind: ClassVar[str]
    dry_run: ClassVar[bool] = False
    name: str
    start_from: str
    weights: str = ""

    @property
    def directory(self) -> str:
        return self.name

    def has_state(self, directory: Path) -> bool:
        return False

    def hands_over(self, directory: Path, variant: str) -> Path:
        raise UserError(f"stage '{self.name}' of kind {self.kind} hands no weights over: start from one that trains")


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


def hashes(index: Index, name: str) -> dict[str, Any]:
    """What a split is made of, down to each shard."""
    split = index.split(name)
    return {
        "fingerprint": index.fingerprint(name),
        "num_samples": split.num_samples,
        "offsets_sha256": split.offsets_sha256,
        "shards": {shard.name: shard.sha256 for shard in split.shards},
    }
