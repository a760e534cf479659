"""Stages of somebody's own, whose work is to write a line."""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.record import write_outcome
from shards.errors import UserError


@dataclass(frozen=True)
class Written:
    """A stage of somebody's own. It takes two turns of work, and is stopped after the first while `stopped`."""

    kind: ClassVar[str] = "written"
    dry_run: ClassVar[bool] = False
    name: str
    text: str
    start_from: str = ""
    weights: str = ""
    stopped: bool = False

    @property
    def directory(self):
        return self.name

    def check(self, world, source):
        if "#" in self.text:
            raise UserError(f"text {self.text}: no # can be written")

    def inputs(self):
        return {"text": self.text} if self.text else {}

    def sources(self):
        return {"data": "none"}

    def has_state(self, directory):
        return (directory / "half").exists()

    def work(self, directory, start, world):
        (directory / "half").write_text(self.text)
        if self.stopped:
            return "requeue"
        (directory / "weights").mkdir(exist_ok=True)
        path = directory / "weights" / "line"
        with path.open("a") as file:
            file.write((start.read_text() if start else "") + self.text + "\n")
        write_outcome(directory, "done", 1, "written")
        return "done"

    def outputs(self, directory):
        return [directory / "weights" / "line"]

    def hands_over(self, directory, variant):
        return directory / "weights" / "line"


def three(a="a", b="b", c="c"):
    """b and c both start from a."""
    return [Written("first", a), Written("second", b, "first"), Written("third", c, "first")]
