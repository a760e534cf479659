"""Tables of runs: a column a run."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.report.cost import Cost, checkpoint_state, total
from pipeline.status import Facts, Progress, best_evaluation, progress_of, seconds_of
from pipeline.status.files import number
from pipeline.status.words import clock, duration, large
from pipeline.status.writer import last_attempt

SCORES = {
    f"{prefix}{head}_{metric}": f"{metric.title().replace('p', 'p-')}, {named}{weights}"
    for metric in ("top1", "top5")
    for prefix, weights in (("ema_", "averaged"), ("", "raw"))
    for head, named in (("memory", "memory head, "), ("process", "process head, "), ("head", ""))
}
NOTHING = "-"


@dataclass(frozen=True)
class Row:
    """`best`: the place of the highest score, where all runs are evaluated on the same data. `differs`: not all are
    equal."""

    name: str
    cells: tuple[str, ...]
    best: int | None = None
    differs: bool = False


@dataclass(frozen=True)
class Table:
    heads: tuple[str, ...]
    rows: tuple[Row, ...]


def summary(runs: Sequence[Facts]) -> list[Row]:
    """What is known of each run, and rows of what is known of none left out."""
    rows = [Row(name, tuple(map(say, runs))) for name, say in FACTS.items()]
    scores = [_scores(runs, name, title) for name, title in SCORES.items()]
    return [row for row in (*rows[:3], *scores, *rows[3:]) if any(cell != NOTHING for cell in row.cells)]


def costs(found: Sequence[Cost], priced: bool) -> list[Row]:
    """The last column is the sum, where there are several runs."""
    columns = [*found, total(found)] if len(found) > 1 else list(found)
    rows: dict[str, Callable[[Cost], str]] = {
        "Images trained on": lambda cost: _large(cost.images),
        "Parameters": lambda cost: _large(cost.parameters),
        "Processes (a GPU each, where there are some)": lambda cost: _large(cost.world),
        "Process hours (GPU hours)": lambda cost: f"{cost.hours:,.3g}" if cost.hours is not None else NOTHING,
        "Floating-point operations of training": lambda cost: f"{cost.flops:.3g}" if cost.flops else NOTHING,
    }
    if priced:
        rows["Price"] = lambda cost: f"{cost.price:,.2f}" if cost.price is not None else NOTHING
    return [Row(name, tuple(map(say, columns))) for name, say in rows.items()]


def recipes(runs: Sequence[Facts]) -> list[Row]:
    """Every field of the recipes."""
    names = dict.fromkeys(name for facts in runs for name in facts.recipe)
    return [_field(runs, name) for name in names]


def attempts(facts: Facts) -> Table:
    """Where and how each attempt ran, as its line tells it; of what older lines lack, the last attempt's as its log
    and checkpoint tell it."""
    lines = [dict(line) for line in facts.attempts]
    writer, _ = last_attempt(facts.logs / "rank-0.log")
    if lines:
        state = checkpoint_state(facts)
        known = {"host": writer and writer.host, "commit": writer and writer.commit, "world": writer and writer.world}
        known = {name: state.get(name) if value is None else value for name, value in known.items()}
        known["strategy"] = state.get("strategy")
        lines[-1] = {name: value for name, value in known.items() if value is not None} | lines[-1]
    heads = tuple(dict.fromkeys(("started", "step", *(name for line in lines for name in line))))
    rows = (
        Row(str(count), tuple(_told(name, line.get(name)) for name in heads)) for count, line in enumerate(lines, 1)
    )
    return Table(heads, tuple(rows))


def text_of(value: object) -> str:
    """Any value of a JSON file, on one line."""
    if value is None or value == "":
        return NOTHING
    if isinstance(value, dict):
        return ", ".join(f"{name} {text_of(inner)}" for name, inner in value.items()) or NOTHING
    return value if isinstance(value, str) else json.dumps(value)


def _told(name: str, value: object) -> str:
    found = number(value)
    return clock(found) if name == "started" and found is not None else text_of(value)


def _field(runs: Sequence[Facts], name: str) -> Row:
    cells = tuple(text_of(facts.recipe.get(name)) for facts in runs)
    return Row(name, cells, differs=len(set(cells)) > 1)


def _scores(runs: Sequence[Facts], name: str, title: str) -> Row:
    values = [number(_last_scores(facts).get(name)) for facts in runs]
    known = [value for value in values if value is not None]
    cells = tuple(NOTHING if value is None else f"{value:.2%}" for value in values)
    data = {tuple(text_of(facts.recipe.get(name)) for name in ("data.path", "data.val")) for facts in runs}
    comparable = len(known) > 1 and len(data) == 1 and min(known) < max(known)
    best = values.index(max(known)) if comparable else None
    return Row(title, cells, best)


def _last_scores(facts: Facts) -> dict[str, Any]:
    """Of a stage that evaluates one file of weights, by whether these are averaged."""
    if facts.evaluations:
        return facts.evaluations[-1]
    averaged = Path(str(facts.evaluation.get("weights", ""))).stem in ("ema", "best_ema")
    if not averaged or any(name.startswith("ema_") for name in facts.evaluation):
        return facts.evaluation
    return {f"ema_{name}": value for name, value in facts.evaluation.items()}


def _steps(facts: Facts) -> str:
    progress: Progress = progress_of(facts)
    of = f" of {progress.total:,}" if progress.total else ""
    epochs = f" ({progress.epoch:.4g} epochs)" if progress.epoch is not None else ""
    return f"{progress.step:,}{of}{epochs}" if facts.begun and (progress.step or of) else NOTHING


def _best(facts: Facts) -> str:
    best = best_evaluation(facts)
    weights = "averaged" if best and best.metric.startswith("ema_") else "raw"
    return f"{best.value:.2%} at step {best.step:,}, {weights}" if best else NOTHING


def _time(facts: Facts) -> str:
    seconds = seconds_of(facts)
    return duration(seconds) if seconds is not None else NOTHING


def _median(name: str, form: str) -> Callable[[Facts], str]:
    def say(facts: Facts) -> str:
        values = [value for line in facts.steps if (value := number(line.get(name))) is not None]
        return format(median(values), form) if values else NOTHING

    return say


def _recipe(name: str) -> Callable[[Facts], str]:
    return lambda facts: text_of(facts.recipe.get(name))


def _commit(facts: Facts) -> str:
    return f"step {facts.commit.step:,}, {clock(facts.commit.time)}" if facts.commit else NOTHING


def _counted(lines: Callable[[Facts], Sequence[Any]]) -> Callable[[Facts], str]:
    return lambda facts: f"{len(lines(facts)):,}" if facts.begun else NOTHING


def _large(value: float | None) -> str:
    return NOTHING if value is None else large(value)


FACTS: dict[str, Callable[[Facts], str]] = {
    "Steps": _steps,
    "Time": _time,
    "Best top-1 on the way": _best,
    "Images a second, median": _median("images_per_second", ",.0f"),
    "Waiting for data, median": _median("data_wait", ".1%"),
    "Model": _recipe("model.name"),
    "Data": _recipe("data.path"),
    "Start weights": _recipe("model.start"),
    "Global batch": _recipe("data.global_batch"),
    "Learning rate": _recipe("schedule.lr"),
    "Last checkpoint": _commit,
    "Attempts": _counted(lambda facts: facts.attempts),
    "Bad samples (quarantine)": _counted(lambda facts: facts.quarantine),
    "Skipped steps": _counted(lambda facts: facts.skipped),
}


def remarks(facts: Facts, limit: int = 10) -> Iterator[str]:
    """The first bad samples and skipped steps."""
    for line in facts.quarantine[:limit]:
        step, shard, key, reason = (text_of(line.get(name)) for name in ("step", "shard", "key", "reason"))
        yield f"bad sample, step {step}: {shard}, {key}: {reason}"
    for line in facts.skipped[:limit]:
        step, loss, outcome = (text_of(line.get(name)) for name in ("step", "loss", "outcome"))
        yield f"skipped step {step}: loss {loss}, {outcome}"
