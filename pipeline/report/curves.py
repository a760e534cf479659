"""Interactive plots, made with plotly: a curve a run, or several of one run, over steps, epochs or images."""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from plotly.graph_objects import Figure, Scatter
from plotly.io.json import to_json_plotly

from pipeline.report.colours import RUNS, colour_of
from pipeline.status import Facts
from pipeline.status.files import number
from pipeline.status.progress import global_batch, steps_per_epoch
from pipeline.status.words import clock

MAX_POINTS = 1500
"""Of a curve; of more, neighbours are averaged."""
GRID = "rgba(128,128,128,.22)"
TRAINING = {
    "loss": ("Training loss", ".4f"),
    "lr": ("Learning rate", ".3e"),
    "grad_norm": ("Gradient norm", ".3f"),
    "images_per_second": ("Images a second", ",.0f"),
    "data_wait": ("Time spent waiting for data", ".1%"),
}
SHARE = {"tickformat": ".2~%", "autorangeoptions": {"clipmin": 0, "clipmax": 1.02}}
EVALUATED = {"top1": ("Top-1", ".2%"), "top5": ("Top-5", ".2%"), "loss": ("Validation loss", ".4f")}
HEADS = {"memory": "solid", "process": "dash", "head": "solid"}
AVERAGED = "ema_"


@dataclass(frozen=True)
class Series:
    """A run among those that are drawn."""

    label: str
    facts: Facts


@dataclass(frozen=True)
class Key:
    """An entry of the legend: a line as it is drawn; colour "" where it is the run's."""

    text: str
    colour: str
    dash: str
    strong: bool


@dataclass(frozen=True)
class Plot:
    """`id`: of its element in the page."""

    id: str
    title: str
    figure: dict[str, Any]


def plots(series: Sequence[Series]) -> list[Plot]:
    """Those of which some run has anything to show."""
    made = [_evaluated(series, metric) for metric in ("top1", "top5")]
    made += [_training(series, "loss"), _evaluated(series, "loss")]
    made += [_training(series, field) for field in TRAINING if field != "loss"]
    return [plot for plot in made if plot.figure["data"]]


def keys(series: Sequence[Series]) -> list[Key]:
    """How the curves of the heads, raw and averaged, are told apart."""
    found = sorted({variant for each in series for variant in _variants(each.facts, "top1")})
    single = len(series) == 1
    return [Key(_named(v), _colour(0, v, single) if single else "", HEADS[v[1]], bool(v[0])) for v in found]


def as_json(made: Sequence[Plot]) -> str:
    """For a script element: nothing in it can end that. What is not finite is null."""
    text = to_json_plotly([{"id": plot.id, **plot.figure} for plot in made], engine="json")
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points, each the mean of equally many neighbours, at the last one's place."""
    size = -(-len(xs) // MAX_POINTS) or 1
    parts = range(0, len(xs), size)
    return [xs[min(start + size, len(xs)) - 1] for start in parts], [fmean(ys[start : start + size]) for start in parts]


def _training(series: Sequence[Series], field: str) -> Plot:
    title, form = TRAINING[field]
    traces = [
        _line(each, run, points, {"name": html.escape(each.label), "line": {"color": colour_of(run), "width": 1.6}})
        for run, each in enumerate(series)
        if (points := _points(each.facts.steps, field))
    ]
    return _plot(field, title, form, series, traces)


def _evaluated(series: Sequence[Series], metric: str) -> Plot:
    title, form = EVALUATED[metric]
    traces = []
    for run, each in enumerate(series):
        for variant in _variants(each.facts, metric):
            prefix, head = variant
            if not (points := _points(each.facts.evaluations, f"{prefix}{head}_{metric}")):
                continue
            name = _named(variant) if len(series) == 1 else f"{html.escape(each.label)}: {_named(variant)}"
            line = {"color": _colour(run, variant, len(series) == 1), "dash": HEADS[head], "width": 2 if prefix else 1}
            traces.append(_line(each, run, points, {"name": name, "line": line, "opacity": 1 if prefix else 0.65}))
    return _plot(f"evaluated_{metric}", title, form, series, traces)


def _variants(facts: Facts, metric: str) -> list[tuple[str, str]]:
    """(prefix of the average or "", head) of what was evaluated."""
    names = {name for line in facts.evaluations for name in line}
    return [(prefix, head) for prefix in (AVERAGED, "") for head in HEADS if f"{prefix}{head}_{metric}" in names]


def _named(variant: tuple[str, str]) -> str:
    prefix, head = variant
    return (
        f"{head} head, {'averaged' if prefix else 'raw'} weights"
        if head != "head"
        else ("averaged weights" if prefix else "raw weights")
    )


def _colour(run: int, variant: tuple[str, str], single: bool) -> str:
    return RUNS[1] if single and variant[1] == "process" else colour_of(run)


def _points(lines: Sequence[Mapping[str, Any]], field: str) -> list[tuple[float, float]]:
    found = ((line["step"], number(line.get(field))) for line in lines)
    return [(step, value) for step, value in found if value is not None]


def _line(each: Series, run: int, points: Sequence[tuple[float, float]], more: dict[str, Any]) -> Scatter:
    xs, ys = thinned(*zip(*points, strict=True))
    mode = "lines+markers" if len(xs) < 40 else "lines"
    return Scatter(x=xs, y=ys, mode=mode, marker={"size": 5}, meta=_scales(each.facts, run), **more)


def _scales(facts: Facts, run: int) -> dict[str, float | None]:
    """What a step is in the other units of the horizontal axis; null where that is not known."""
    per_epoch = steps_per_epoch(facts)
    return {"run": run, "epoch": 1 / per_epoch if per_epoch else None, "images": global_batch(facts)}


def _plot(name: str, title: str, form: str, series: Sequence[Series], traces: list[Scatter]) -> Plot:
    if traces:
        traces += [trace for run, each in enumerate(series) for trace in _restarts(each, run)]
    quiet: dict[str, Any] = {"gridcolor": GRID, "zeroline": False, "automargin": True}
    layout = {
        "height": 300,
        "margin": {"l": 8, "r": 8, "t": 28, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "hovermode": "x unified",
        "xaxis": quiet | {"title": {"text": "step"}, "rangemode": "tozero"},
        "yaxis": quiet | {"hoverformat": form} | (SHARE if form.endswith("%") else {}),
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
    }
    return Plot(f"plot-{name}", title, Figure(traces, layout).to_plotly_json())


def _restarts(each: Series, run: int) -> Iterator[Scatter]:
    """A mark on the horizontal axis for every attempt but the first."""
    later = list(enumerate(each.facts.attempts, start=1))[1:]
    placed = [(count, line, step) for count, line in later if (step := number(line.get("step"))) is not None]
    if placed:
        texts = [f"{html.escape(each.label)}: {_told(count, line)}" for count, line, _ in placed]
        yield Scatter(
            x=[step for _, _, step in placed],
            y=[0.015] * len(placed),
            yaxis="y2",
            mode="markers",
            name="restarts",
            text=texts,
            hovertemplate="%{text}<extra></extra>",
            marker={"symbol": "triangle-up", "size": 9, "color": colour_of(run)},
            meta=_scales(each.facts, run),
        )


def _told(count: int, attempt: Mapping[str, Any]) -> str:
    started = number(attempt.get("started"))
    return f"attempt {count}" + (f", started {clock(started)}" if started is not None else "")
