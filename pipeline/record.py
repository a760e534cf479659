"""What a run leaves to be read: metrics.jsonl, TensorBoard, the progress bar, recipe.json and outcome.json."""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline.recipe import Recipe, flatten
from shards.durable import atomic_file
from shards.errors import UserError

T = TypeVar("T")
METRICS = "metrics.jsonl"
OUTCOME = "outcome.json"
RECIPE = "recipe.json"
MAY_CHANGE = (
    "run_dir",
    "checkpoint.",
    "data.path",
    "data.remote",
    "data.cache",
    "data.workers",
    "data.max_bad",
    "data.accumulation",
    "evaluation.batch",
    "runtime.device",
    "runtime.processes",
    "runtime.max_skipped",
    "runtime.fsdp_replicas",
    "runtime.compile",
    "runtime.activation_checkpointing",
    "runtime.log_every",
)
"""Fields that a resumed run may change: they decide how, not what, is computed (the index has its own fingerprint)."""


class Meter:
    """Images a second, and the share of the time spent waiting for data, since it was last read. Evaluations and
    checkpoints are left out."""

    def __init__(self, global_batch: int) -> None:
        self.global_batch = global_batch
        self.restart()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for one step's data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._since
        values = {"images_per_second": self._steps * self.global_batch / seconds, "data_wait": self._waited / seconds}
        self.restart()
        return values

    def restart(self) -> None:
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0


class Record:
    """The record of one run, written by rank 0; on other ranks every method does nothing.

    `step` counts finished optimizer steps. A line is one JSON object: a logged step, or an evaluation ("split").
    """

    def __init__(self, run_dir: Path, is_main: bool, global_batch: int) -> None:
        self.run_dir = run_dir
        self.is_main = is_main
        self.meter = Meter(global_batch)

    @contextmanager
    def open(self, start: int, total: int) -> Iterator[None]:
        """Cuts what an earlier attempt wrote past `start`, then appends."""
        self.meter.restart()
        if not self.is_main:
            yield
            return
        cut_metrics(self.run_dir, start)
        board = SummaryWriter(self.run_dir / "tensorboard", purge_step=start + 1)
        bar = tqdm(initial=start, total=total, unit="step", disable=None, dynamic_ncols=True)
        with (self.run_dir / METRICS).open("a") as self._file, board as self._board, bar as self._bar:
            self._started, self._start, self._total = time.monotonic(), start, total
            yield

    def step(self, step: int) -> None:
        if self.is_main:
            self._bar.update(step - self._bar.n)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One line for a logged step, with the speed since the last one, in TensorBoard and beside the bar too (or
        printed, without a terminal)."""
        values = values | self.meter.read()
        if self.is_main:
            self._write({"step": step, **values})
            self._bar.set_postfix_str(_brief(values))
            if self._bar.disable:
                print(f"step {step}/{self._total}  {_brief(values)}  ETA {self._eta(step)}", flush=True)

    def watch(self, batches: Iterator[T], total: float) -> Iterable[T]:
        """The batches of an evaluation, under a bar of their own while they last."""
        disable = None if self.is_main else True
        return tqdm(batches, total=math.ceil(total), unit="batch", desc="evaluation", leave=False, disable=disable)

    def evaluation(self, step: int, split: str, values: dict[str, float]) -> None:
        if self.is_main:
            self._write({"step": step, "split": split, **values})
            brief = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if name.endswith("top1"))
            if values.get("unreadable"):
                brief += f"  ({values['unreadable']:.0f} images are unreadable and count as wrong: quarantine.jsonl)"
            self._bar.write(f"step {step}  {split}: {brief}")

    def flush(self) -> None:
        """Metrics reach the disk before the checkpoint that continues them."""
        if self.is_main:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._board.flush()

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in line.items():
            if isinstance(value, float):
                self._board.add_scalar(f"{line.get('split', 'train')}/{name}", value, line["step"])

    def _eta(self, step: int) -> str:
        seconds = (time.monotonic() - self._started) / (step - self._start) * (self._total - step)
        return tqdm.format_interval(seconds)


def cut_metrics(run_dir: Path, step: int) -> None:
    """Drops a torn last line, and every line after `step`; of `step` itself the evaluation, which a checkpoint of that
    step precedes."""
    lines = read_metrics(run_dir)
    kept = [line for line in lines if line["step"] < step or (line["step"] == step and "split" not in line)]
    _replace(run_dir / METRICS, "".join(json.dumps(line) + "\n" for line in kept))


def write_outcome(run_dir: Path, outcome: str, step: int, reason: str, **more: float) -> None:
    """outcome: "done", "requeue" or "error"; launch scripts read it, for launchers hide exit codes."""
    run_dir.mkdir(parents=True, exist_ok=True)
    _replace(run_dir / OUTCOME, json.dumps({"outcome": outcome, "step": step, "reason": reason, **more}) + "\n")


def forget_outcome(run_dir: Path) -> None:
    """Removes the outcome of an earlier attempt: a run that is killed leaves none."""
    (run_dir / OUTCOME).unlink(missing_ok=True)


def read_outcome(run_dir: Path) -> dict:
    """The last outcome; {} where there is none."""
    path = run_dir / OUTCOME
    return json.loads(path.read_text()) if path.exists() else {}


def last_evaluation(run_dir: Path) -> dict[str, float]:
    """The last evaluation in the metrics of a finished run."""
    return [line for line in read_metrics(run_dir) if "split" in line][-1]


def last_step(run_dir: Path) -> int:
    """The last step in the metrics of a run; 0 where there is none."""
    return max((line["step"] for line in read_metrics(run_dir)), default=0)


def read_metrics(run_dir: Path) -> list[dict]:
    """The whole lines of a run's metrics."""
    path = run_dir / METRICS
    texts = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for text in texts if (line := _parse_line(text)) is not None]


def keep_recipe(run_dir: Path, recipe: Recipe) -> None:
    """RUN/recipe.json: every field by its name on the command line."""
    run_dir.mkdir(parents=True, exist_ok=True)
    _replace(run_dir / RECIPE, json.dumps(flatten(recipe), indent=1) + "\n")


def check_same_recipe(kept: dict[str, object], recipe: Recipe, where: object) -> None:
    """Raises UserError where `where`, made by the flattened recipe `kept`, is not what `recipe` would make."""
    changed = [
        f"{name}: {kept.get(name)!r} there, {value!r} now"
        for name, value in flatten(recipe).items()
        if kept.get(name) != value and not name.startswith(MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{where} was made by another recipe; to continue it with this one would mix both:\n"
            + "\n".join(f"  - {text}" for text in changed)
            + "\ngive those values to continue it, or another --run-dir to start anew"
        )


def _parse_line(text: str) -> dict | None:
    try:
        return json.loads(text) if text.endswith("\n") else None
    except json.JSONDecodeError:
        return None


def _replace(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def _brief(values: dict[str, float]) -> str:
    shown = {"loss": ".4f", "lr": ".2e", "grad_norm": ".3f", "images_per_second": ".0f", "data_wait": ".1%"}
    return "  ".join(f"{name} {values[name]:{form}}" for name, form in shown.items() if math.isfinite(values[name]))
