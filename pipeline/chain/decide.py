"""What is to be done with each stage: skipped, gone on with, done, done again in a new directory, or refused."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.chain.records import PROVENANCE, Book, read_book, read_provenance, sha256_of
from pipeline.chain.stage import Stage, check_graph
from pipeline.record import read_outcome
from shards.errors import UserError

HANDED = "weights of {}"
TO_COME = "what it is yet to leave"


@dataclass(frozen=True)
class Options:
    """again: the stage from which on all is to be done anew (--from); only: the stages to do (none: all)."""

    again: str = ""
    only: tuple[str, ...] = ()
    listing: bool = False


@dataclass(frozen=True)
class Step:
    """What happens to a stage, and why; `directory` is below the chain's. leave: it is not looked at (--only);
    wait: for one that is refused."""

    action: Literal["skip", "resume", "run", "leave", "refuse", "wait"]
    directory: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """A step for each stage by its name, and the book as it is to be kept."""

    steps: Mapping[str, Step]
    book: Book


def decide(stages: Sequence[Stage], root: Path, options: Options) -> Plan:
    """Raises UserError for a graph, options or records that make no sense; what may not be gone on with is a step."""
    check_graph(stages)
    _check_names(stages, options)
    book = read_book(root)
    pending = bool(options.again) and book.again == options.again
    decider = _Decider(root, options, book, _downstream(stages, options.again), pending)
    for stage in stages:
        decider.steps[stage.name] = decider.step(stage)
    directories = {}
    for name, step in decider.steps.items():
        others = [directory for directory in book.directories.get(name, ()) if directory != step.directory]
        directories[name] = (*others, step.directory)
    return Plan(decider.steps, Book(directories, options.again or book.again))


@dataclass
class _Decider:
    """anew: the stages that --from asks for; pending: it did so before, and they have their new directories already."""

    root: Path
    options: Options
    book: Book
    anew: frozenset[str]
    pending: bool
    steps: dict[str, Step] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)

    def step(self, stage: Stage) -> Step:
        self.stages[stage.name] = stage
        directory = self.book.current(stage)
        if self.options.only and stage.name not in self.options.only:
            return Step("leave", directory, "not named by --only")
        if stage.start_from and self.steps[stage.start_from].action in ("refuse", "wait"):
            return Step("wait", directory, f"waits for {stage.start_from}")
        self._check_source(stage)
        kept, finished = read_provenance(self.root / directory), is_finished(self.root / directory)
        asked = stage.name in self.anew
        begun = finished or stage.has_state(self.root / directory)
        inputs = {**stage.inputs(), **self._handed(stage)}  # read whatever is decided: what is missing is told now
        if asked and begun and not self.pending:
            return self._again(stage, f"--from {self.options.again}")
        noted = kept.get("inputs", {})
        changed = differences(noted, inputs)
        if begun and kept and not changed:
            return self._unchanged(stage, directory) if finished else Step("resume", directory, "goes on")
        if not asked and (earlier := self._earlier(stage, inputs)):
            return self._unchanged(stage, earlier)
        if not begun:
            return Step("run", directory, "begins")
        if kept and not asked and not changed.keys() & noted.keys():
            return Step("refuse", directory, _of_older(stage, self.root / directory, changed))
        if (finished and kept) or asked:
            return self._again(stage, "its inputs changed: " + "; ".join(changed.values()))
        return Step("refuse", directory, _refusal(stage, self.root / directory, changed.values(), bool(kept)))

    def _check_source(self, stage: Stage) -> None:
        """Raises UserError where --only leaves the stage out that this one waits for."""
        source = self.steps.get(stage.start_from)
        if source and source.action == "leave" and not is_finished(self.root / source.directory):
            raise UserError(
                f"--only {' '.join(self.options.only)}: stage '{stage.name}' starts from '{stage.start_from}', which "
                f"is not finished in {self.root / source.directory}: name it, too, or leave --only out"
            )

    def _earlier(self, stage: Stage, inputs: Mapping[str, object]) -> str:
        """The last directory in which the stage was finished with these inputs; "" where there is none."""
        for directory in reversed(self.book.directories.get(stage.name, ())):
            kept = read_provenance(self.root / directory)
            if is_finished(self.root / directory) and kept and not differences(kept["inputs"], inputs):
                return directory
        return ""

    def _again(self, stage: Stage, why: str) -> Step:
        return Step("run", self.book.unused(stage, self.root), f"begins again, {self.book.current(stage)} stays: {why}")

    def _unchanged(self, stage: Stage, directory: str) -> Step:
        """A finished stage is skipped if what it left is still there."""
        path = self.root / directory
        lost = [
            name
            for name, entry in read_provenance(path)["outputs"].items()
            if not (path / name).is_file() or (path / name).stat().st_size != entry["size"]
        ]
        if lost:
            remedy = f"restore them, or give --from {stage.name} to do it again in a new directory"
            reason = f"stage {stage.name}, finished in {path}, has lost what it left: {', '.join(lost)}: {remedy}"
            return Step("refuse", directory, reason)
        return Step("skip", directory, "finished before, skipped")

    def _handed(self, stage: Stage) -> dict[str, object]:
        """The hash of the weights that the stage starts from, where they are there already."""
        if not stage.start_from:
            return {}
        source, step = self.stages[stage.start_from], self.steps[stage.start_from]
        name, directory = HANDED.format(source.name), self.root / step.directory
        if step.action in ("run", "resume"):
            return {name: TO_COME}
        return {name: check_output(directory, source.hands_over(directory, stage.weights))}


def is_finished(directory: Path) -> bool:
    """Whether a stage is, and what it left was noted; or whether it was finished outside of a chain."""
    kept = read_provenance(directory)
    return read_outcome(directory).get("outcome") == "done" and (not kept or "outputs" in kept)


def check_output(directory: Path, path: Path) -> str:
    """The hash of a file that a stage left. Raises UserError where it is not what it was."""
    outputs = read_provenance(directory).get("outputs", {})
    noted, now = outputs.get(str(path.relative_to(directory)), {}).get("sha256"), sha256_of(path)
    if noted not in (None, now):
        raise UserError(
            f"{path} is not the file that the stage left: its SHA-256 was {noted}, and is {now}; restore it, or give "
            "--from with the name of that stage to do it again in a new directory"
        )
    return now


def differences(kept: Mapping[str, object], now: Mapping[str, object]) -> dict[str, str]:
    """Of a stage's inputs, by their names, each with both values."""
    names = [*now, *(name for name in kept if name not in now)]
    return {
        name: f"{name}: {_short(kept.get(name))} there, {_short(now.get(name))} now"
        for name in names
        if kept.get(name) != now.get(name)
    }


def _short(value: object) -> str:
    """A hash by its first digits."""
    return f"{value[:16]}..." if isinstance(value, str) and len(value) == 64 else repr(value)


def _downstream(stages: Sequence[Stage], name: str) -> frozenset[str]:
    """The stage, and all that start from what it leaves."""
    found = {name} if name else set()
    for stage in stages:
        if stage.start_from in found:
            found.add(stage.name)
    return frozenset(found)


def _begin_again(stage: Stage, directory: Path) -> str:
    return f"or --from {stage.name} to begin it again in a new directory; {directory} stays as it is"


def _of_older(stage: Stage, directory: Path, changed: Mapping[str, str]) -> str:
    """A version of this program with one input more does not make weeks of training stale by itself."""
    listed = "".join(f"\n  - {text}" for text in changed.values())
    return (
        f"stage {stage.name}: {directory / PROVENANCE} is of an older version, and does not say what these inputs were:"
        f'{listed}\nadd them to its "inputs" with the values that they had, {_begin_again(stage, directory)}'
    )


def _refusal(stage: Stage, directory: Path, changed: Iterable[str], known: bool) -> str:
    begin = _begin_again(stage, directory)
    if not known:
        return (
            f"stage {stage.name}: {directory} was begun outside of this chain, and what went into it is not known (it "
            f"has no provenance.json): give another --run-dir, {begin}"
        )
    listed = "".join(f"\n  - {text}" for text in changed)
    return f"stage {stage.name}, unfinished in {directory}, has other inputs now:{listed}\ngive those values, {begin}"


def _check_names(stages: Sequence[Stage], options: Options) -> None:
    names = [stage.name for stage in stages]
    for option, given in (("--from", options.again), *(("--only", name) for name in options.only)):
        if given and given not in names:
            near = difflib.get_close_matches(given, names, n=1, cutoff=0.0)
            raise UserError(f"{option} {given}: the chain has no such stage, only {names}; did you mean {near[0]}?")
    if options.only and options.again and options.again not in options.only:
        raise UserError(
            f"--from {options.again} --only {' '.join(options.only)}: the stage to begin again is not among those to "
            "do; name it in --only, too, or leave one of both out"
        )
