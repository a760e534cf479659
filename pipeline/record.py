"""What a run leaves to be read: metrics.jsonl, TensorBoard, the progress bar, recipe.json and outcome.json."""

import json
import math
import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TypeVar

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline.recipe import Recipe, flatten, unflatten
from shards.durable import atomic_file
from shards.errors import UserError

T = TypeVar("T")
METRICS = "metrics.jsonl"
OUTCOME = "outcome.json"
RECIPE = "recipe.json"
MAY_CHANGE = (
    *("run_dir", "checkpoint.", "evaluation.batch"),
    *("data.path", "data.remote", "data.cache", "data.workers", "data.max_bad", "data.accumulation"),
    *("runtime.device", "runtime.processes", "runtime.max_skipped", "runtime.log_every"),
    *("runtime.fsdp_replicas", "runtime.compile", "runtime.activation_checkpointing"),
)
"""Fields that a resumed run may change: they decide how, not what, is computed (the index has its own fingerprint)."""


class Meter:
    """Images a second, the share of the time spent waiting for data, and the seconds that training stood still for
    checkpoints, since it was last read. Of images and data, evaluations and checkpoints are left out."""

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

    def saved(self, seconds: float) -> None:
        """So long a checkpoint made the training stand still."""
        self._since += seconds
        self._saved += seconds

    def read(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._since
        values = {
            "images_per_second": self._steps * self.global_batch / seconds,
            "data_wait": self._waited / seconds,
            "save_seconds": self._saved,
        }
        self.restart()
        return values

    def restart(self) -> None:
        self._since, self._waited, self._saved, self._steps = time.perf_counter(), 0.0, 0.0, 0


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

    def saved(self, step: int, seconds: float) -> None:
        """A checkpoint of `step` made the training stand still for so long; the next logged step has it, too."""
        self.meter.saved(seconds)
        if self.is_main:
            self._bar.write(f"step {step}  checkpoint: training stood still for {seconds:.3f} s")

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


def kept_metrics(run_dir: Path, step: int) -> list[dict]:
    """The lines that a run which resumes at `step` goes on from: those to `step`, but for its evaluation, which a
    checkpoint of that step precedes."""
    lines = read_metrics(run_dir)
    return [line for line in lines if line["step"] < step or (line["step"] == step and "split" not in line)]


def cut_metrics(run_dir: Path, step: int) -> None:
    """Drops what `kept_metrics` does not give, and a torn last line."""
    kept = kept_metrics(run_dir, step)
    _replace(run_dir / METRICS, "".join(json.dumps(line) + "\n" for line in kept))


def write_outcome(run_dir: Path, outcome: str, step: int, reason: str, **more: float) -> None:
    """outcome: "done", "requeue" or "error"; launch scripts read it, for launchers hide exit codes."""
    run_dir.mkdir(parents=True, exist_ok=True)
    _replace(run_dir / OUTCOME, json.dumps({"outcome": outcome, "step": step, "reason": reason, **more}) + "\n")


def forget_outcome(run_dir: Path) -> None:
    """Removes the outcome of an earlier attempt: a run that is killed leaves none. Raises UserError where it cannot."""
    try:
        (run_dir / OUTCOME).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(run_dir, error) from error


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


def check_writable(run_dir: Path) -> None:
    """Raises UserError unless a file can be written in `run_dir`, which is made if need be."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=run_dir) as file:
            file.write(b"0")
    except OSError as error:
        raise _unwritable(run_dir, error) from error


def keep_recipe(run_dir: Path, recipe: Recipe) -> None:
    """RUN/recipe.json: every field by its name on the command line."""
    run_dir.mkdir(parents=True, exist_ok=True)
    _replace(run_dir / RECIPE, json.dumps(flatten(recipe), indent=1) + "\n")


def read_recipe(run_dir: Path) -> Recipe:
    """What `keep_recipe` kept. Raises UserError where it is missing, or has other fields than recipes have now."""
    path = run_dir / RECIPE
    if not path.is_file():
        raise UserError(f"{path}: no such file; it says how the model of a run is built: give a run that kept it")
    try:
        leaves = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not the JSON that a run writes ({error}): restore it from a copy") from error
    fields = flatten(Recipe())
    lacking = {name: value for name, value in fields.items() if name not in leaves}
    if unknown := [name for name in leaves if name not in fields]:
        raise UserError(
            f"{path} has the fields {unknown}, which recipes do not have now: use the version that wrote it"
        )
    if lacking:
        raise UserError(
            f"{path} is of an older version, and lacks fields that recipes have now: add them with the values that the "
            f"run had; the defaults are {json.dumps(lacking)[1:-1]}"
        )
    return unflatten(leaves, Recipe)


def weights_path(run_dir: Path, name: str) -> Path:
    """Where a run leaves its weights; name: "model" or "ema" at its end, "best_model" or "best_ema" on the way."""
    return run_dir / "weights" / f"{name}.safetensors"


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


def code_version() -> str:
    """The commit of this code, as git describes it; "unknown" where it is not in a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _unwritable(run_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"run_dir {run_dir} cannot be written ({error}): checkpoints, metrics and the outcome go there; mend its "
        "permissions, make room, or give another --run-dir"
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
