"""The page: everything gathered, then set by the template."""

import base64
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pipeline.report import curves, graph, tables
from pipeline.report.colours import colour_of
from pipeline.report.cost import Cost, cost_of
from pipeline.report.graph import Graph, Told
from pipeline.report.mistakes import Mistakes, worst_mistakes
from pipeline.report.pictures import Shown, shown
from pipeline.report.tables import Table
from pipeline.status import (
    Chain,
    Facts,
    State,
    chain_state,
    find_runs,
    labels,
    read_facts,
    seconds_of,
    state_of,
)
from pipeline.status.words import clock, duration, large
from shards.durable import atomic_file, explained
from shards.errors import UserError

TEMPLATE = Path(__file__).parent / "template"
MAX_FILES = 40
TRAIN = "train"
T = TypeVar("T")


@dataclass(frozen=True)
class Part(Generic[T]):
    """Something of a run, or why it is not to be had."""

    value: T | None
    why: str = ""


@dataclass(frozen=True)
class RunPart:
    """One run on the page. `id`: of its element."""

    id: str
    label: str
    colour: str
    kind: str
    path: Path
    state: State
    facts: Facts
    pictures: Part[list[Shown]]
    mistakes: Part[Mistakes]
    evaluation: list[tuple[str, str]]
    attempts: Table
    remarks: tuple[str, ...]
    files: tuple[str, ...]


@dataclass(frozen=True)
class ChainPart:
    label: str
    state: State
    graph: Graph


def write(paths: Sequence[Path], output: Path, price: float | None = None) -> Path:
    """One self-contained HTML file about runs and chains; `price`: of an hour of one process. Gives `output`.

    What a run lacks, the page says. Raises UserError where the file cannot be written.
    """
    page = render(list(paths), price)
    with explained(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output) as file:
            file.write(page.encode(errors="replace"))
    return output


def render(paths: Sequence[Path], price: float | None) -> str:
    chains, run_paths = find_runs(paths)
    kinds = {stage.path.absolute(): stage.kind for chain in chains for stage in chain.stages}
    named = zip(run_paths, labels(run_paths), strict=True)
    runs = [_run(place, path, label, kinds.get(path.absolute(), TRAIN)) for place, (path, label) in enumerate(named)]
    found = [run.facts for run in runs]
    with_recipe = [run for run in runs if run.facts.recipe]
    series = [curves.Series(run.label, run.facts) for run in runs]
    plots, costs = curves.plots(series), [_cost(facts, price) for facts in found]
    scripts = {"plotly": get_plotlyjs(), "ours": (TEMPLATE / "page.js").read_text()}
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=", ".join(path.absolute().name for path in paths),
            made=clock(time.time()),
            chains=[_chain(chain, runs) for chain in chains],
            runs=runs,
            plots=plots,
            keys=curves.keys(series),
            figures=Markup(curves.as_json(plots)),
            summary=tables.summary(found),
            costs=tables.costs(costs, price is not None),
            price=price,
            with_recipe=with_recipe,
            recipes=tables.recipes([run.facts for run in with_recipe]),
            style=Markup((TEMPLATE / "page.css").read_text()),
            scripts={name: Markup(text) for name, text in scripts.items()},
            allowed=" ".join(f"'{_hash(text)}'" for text in scripts.values()),
        )
    )


def _environment() -> Environment:
    """Every string is escaped but those that are Markup."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return found


def _hash(script: str) -> str:
    """As a content security policy names a script that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _run(place: int, path: Path, label: str, kind: str) -> RunPart:
    facts = read_facts(path)
    trained = kind == TRAIN and facts.begun
    return RunPart(
        f"run-{place}",
        label,
        colour_of(place),
        kind,
        path,
        state_of(facts),
        facts,
        _part(lambda: shown(path)) if trained else Part(None),
        _part(lambda: worst_mistakes(path)) if trained else Part(None),
        tables.evaluation(facts),
        tables.attempts(facts),
        tuple(tables.remarks(facts)),
        _files(path),
    )


def _chain(chain: Chain, runs: Sequence[RunPart]) -> ChainPart:
    by_path = {run.path.absolute(): run for run in runs}
    told = {stage.name: _told(by_path[stage.path.absolute()]) for stage in chain.stages}
    return ChainPart(chain.path.absolute().name, chain_state(chain), graph.draw(chain, told))


def _told(run: RunPart) -> Told:
    seconds = seconds_of(run.facts, time.time() if run.state.name == "running" else None)
    return Told(run.state, duration(seconds) if seconds is not None else "", run.id)


def _cost(facts: Facts, price: float | None) -> Cost:
    return _part(lambda: cost_of(facts, price)).value or Cost(None, None, None, None, None, None)


def _part(work: Callable[[], T]) -> Part[T]:
    """What comes of it. A page is made of whatever is left of a run: what fails is told there, and does not stop it."""
    try:
        return Part(work())
    except UserError as error:
        return Part(None, str(error))
    except Exception as error:
        return Part(None, f"{type(error).__name__}: {error}")


def _files(path: Path) -> tuple[str, ...]:
    """What lies in the directory but its checkpoints, with sizes: of an export it is all there is."""
    found: list[tuple[str, int]] = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if name != "checkpoints"]
        for file in (os.path.join(folder, name) for name in names):
            with suppress(OSError):  # in a run that goes on, files come and go
                found.append((os.path.relpath(file, path), os.path.getsize(file)))
    listed = [f"{name} ({_size(num_bytes)})" for name, num_bytes in sorted(found)[:MAX_FILES]]
    return (*listed, *([f"and {len(found) - MAX_FILES} more"] if len(found) > MAX_FILES else []))


def _size(num_bytes: int) -> str:
    text = large(num_bytes)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"
