"""A chain as boxes and arrows: columns by how many stages come before, in pixels."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.status import Chain, Stage, State

WIDTH, HEIGHT, ACROSS, DOWN, MARGIN = 190, 66, 56, 18, 6
CHARACTERS, DETAIL = 18, 25


@dataclass(frozen=True)
class Box:
    x: int
    y: int
    name: str
    short: str
    detail: str
    state: State
    target: str


@dataclass(frozen=True)
class Graph:
    """boxes are WIDTH x HEIGHT; arrows: the `d` of SVG paths."""

    width: int
    height: int
    boxes: tuple[Box, ...]
    arrows: tuple[str, ...]
    box_width: int = WIDTH
    box_height: int = HEIGHT


@dataclass(frozen=True)
class Told:
    """What is written into a stage's box. target: the id of what the page says about it."""

    state: State
    time: str
    target: str


def draw(chain: Chain, told: Mapping[str, Told]) -> Graph:
    """told: by the name of a stage."""
    columns = _columns(chain)
    places: dict[str, tuple[int, int]] = {}
    rows: dict[int, int] = {}
    for stage in chain.stages:
        column = columns[stage.name]
        row = rows[column] = rows.get(column, -1) + 1
        places[stage.name] = MARGIN + column * (WIDTH + ACROSS), MARGIN + row * (HEIGHT + DOWN)
    return Graph(
        width=2 * MARGIN + (max(rows) + 1) * (WIDTH + ACROSS) - ACROSS,
        height=2 * MARGIN + (max(rows.values()) + 1) * (HEIGHT + DOWN) - DOWN,
        boxes=tuple(_box(stage, places[stage.name], told[stage.name]) for stage in chain.stages),
        arrows=tuple(
            _arrow(places[before], places[stage.name])
            for stage in chain.stages
            for before in stage.after
            if before in places and columns[before] < columns[stage.name]
        ),
    )


def _columns(chain: Chain) -> dict[str, int]:
    """Of each stage: one more than of what it comes after. Names that are not there do not count, nor do circles."""
    after = {stage.name: [name for name in stage.after if name != stage.name] for stage in chain.stages}
    columns = dict.fromkeys(after, 0)
    for _ in after:
        columns = {
            name: max((columns[before] + 1 for before in befores if before in columns), default=0)
            for name, befores in after.items()
        }
    return {name: min(column, len(after) - 1) for name, column in columns.items()}


def _box(stage: Stage, place: tuple[int, int], told: Told) -> Box:
    tries = f"run {len(stage.earlier) + 1}" if stage.earlier else ""
    parts = (told.state.name, told.time, "" if stage.kind == "train" else stage.kind, tries)
    detail = shortened(" · ".join(filter(None, parts)), DETAIL)
    return Box(*place, stage.name, shortened(stage.name, CHARACTERS), detail, told.state, told.target)


def shortened(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    """From the right side of a box along its row to the gap before the other one, and to the left side of that."""
    (x, y), (to_x, to_y) = (start[0] + WIDTH, start[1] + HEIGHT // 2), (end[0] - 3, end[1] + HEIGHT // 2)
    bend = ACROSS // 2
    return f"M{x},{y} H{end[0] - ACROSS} C{end[0] - bend},{y} {to_x - bend},{to_y} {to_x},{to_y}"
