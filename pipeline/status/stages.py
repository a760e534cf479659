"""A chain's directory as its stages; a run's as itself."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.record import LOGS, METRICS, OUTCOME, RECIPE
from pipeline.status.facts import ATTEMPTS, read_facts
from pipeline.status.files import modified, number, read_object, read_objects
from shards.errors import UserError

CHAIN = "chain.json"


@dataclass(frozen=True)
class Stage:
    """after: the names of the stages that it waits for; earlier: directories that it ran in before."""

    name: str
    kind: str
    after: tuple[str, ...]
    path: Path
    earlier: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Chain:
    path: Path
    stages: tuple[Stage, ...]


def read_chain(path: Path) -> Chain | None:
    """As chain.json says; without one, the runs in a directory that is none itself, in the order of their start. None
    for anything else."""
    listed = read_object(path / CHAIN).get("stages")
    if isinstance(listed, list):
        stages = tuple(_stage(path, entry) for entry in listed if isinstance(entry, dict) and entry.get("name"))
        return Chain(path, stages) if stages else None
    if _is_run(path):
        return None
    found = sorted((child for child in path.glob("*/") if _is_run(child)), key=lambda run: (_started(run), run.name))
    return Chain(path, tuple(_guessed(child, found) for child in found)) if found else None


def find_runs(paths: Iterable[Path]) -> tuple[list[Chain], list[Path]]:
    """The chains among `paths`, and all run directories, those of stages included, each once."""
    chains: list[Chain] = []
    runs: dict[Path, Path] = {}
    for path in paths:
        if chain := read_chain(path):
            chains.append(chain)
        for run in [stage.path for stage in chain.stages] if chain else [path]:
            runs.setdefault(run.absolute(), run)
    return chains, list(runs.values())


def check_is_run(path: Path) -> None:
    """Raises UserError where it is neither a run's directory nor a chain's."""
    facts = read_facts(path)
    if not (facts.begun or facts.outcome or read_chain(path)):
        raise UserError(f"{path} is no run: give a directory that a recipe wrote as its --run-dir, or a chain's")


def labels(paths: Sequence[Path]) -> list[str]:
    """Short names that differ: each path below the deepest directory that all lie in."""
    whole = [Path(os.path.abspath(path)) for path in paths]
    if len(whole) < 2:
        return [path.name for path in whole]
    above = Path(os.path.commonpath(whole))
    return [str(path.relative_to(above)) if path != above else path.name for path in whole]


def _stage(chain: Path, entry: dict[str, Any]) -> Stage:
    name, after, earlier = str(entry["name"]), entry.get("after"), entry.get("earlier")
    return Stage(
        name,
        str(entry.get("kind") or "train"),
        tuple(map(str, after)) if isinstance(after, list) else (),
        chain / str(entry.get("run_dir") or name),
        tuple(chain / str(before) for before in earlier) if isinstance(earlier, list) else (),
    )


def _guessed(run: Path, runs: Sequence[Path]) -> Stage:
    """A stage that starts from another one's weights comes after it."""
    start = read_object(run / RECIPE).get("model.start")
    below = Path(os.path.abspath(start)) if isinstance(start, str) and start else Path("/")
    after = [other.name for other in runs if other != run and below.is_relative_to(os.path.abspath(other))]
    return Stage(run.name, "train", tuple(after), run)


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (RECIPE, METRICS, ATTEMPTS)) or (
        (path / OUTCOME).is_file() and (path / LOGS).is_dir() and not any(path.glob(f"*/{RECIPE}"))
    )


def _started(run: Path) -> float:
    lines = read_objects(run / ATTEMPTS)
    started = number(lines[0].get("started")) if lines else None
    return modified(run / RECIPE) if started is None else started
