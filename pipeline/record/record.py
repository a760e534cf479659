"""The record that a run writes on its way: metrics.jsonl, TensorBoard, trackers, the progress bar."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline.record.attempts import Setting, begin_attempt
from pipeline.record.meter import Meter
from pipeline.record.metrics import METRICS, cut_metrics

T = TypeVar("T")
Values = Mapping[str, float]


class Tracker(Protocol):
    """What else is told what TensorBoard is told."""

    def scalars(self, step: int, values: Values) -> None: ...
    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None: ...
    def finish(self) -> None: ...


def nothing_more(values: Values) -> Values:
    return {}


class Record:
    """The record of one run, written by rank 0; on other ranks every method does nothing.

    `step` counts finished optimizer steps. A line is one JSON object: a logged step, or an evaluation ("split").
    """

    def __init__(self, run_dir: Path, is_main: bool, global_batch: int, setting: Setting | None = None) -> None:
        self.run_dir = run_dir
        self.setting = setting or Setting()
        self.is_main = is_main
        self.meter = Meter(global_batch)
        self.trackers: list[Tracker] = []

    @contextmanager
    def open(self, start: int, total: int) -> Iterator[None]:
        """Cuts what an earlier attempt wrote past `start`, then appends."""
        self.meter.restart()
        if not self.is_main:
            yield
            return
        cut_metrics(self.run_dir, start)
        self._first_start = begin_attempt(self.run_dir, start, self.setting)
        board = SummaryWriter(self.run_dir / "tensorboard", purge_step=start + 1)
        bar = tqdm(initial=start, total=total, unit="step", disable=None, dynamic_ncols=True)
        with (self.run_dir / METRICS).open("a") as self._file, board as self._board, bar as self._bar:
            self._started, self._start, self._total = time.monotonic(), start, total
            try:
                yield
            finally:
                for tracker in self.trackers:
                    tracker.finish()

    def step(self, step: int, kept: bool = True) -> None:
        """`kept`: whether its changes stay in the weights."""
        self.meter.stepped(kept)
        if self.is_main:
            self._bar.update(step - self._bar.n)

    def metrics(self, step: int, values: dict[str, float], more: Callable[[Values], Values] = nothing_more) -> None:
        """One line for a logged step, with the speed since the last one, in TensorBoard and beside the bar too (or
        printed, without a terminal). What `more` makes of these values, and the goodput, are for TensorBoard and the
        trackers alone: they tell the time, in which a resumed run differs from one that went on."""
        values = values | self.meter.read()
        shown = more(values)
        if self.is_main:
            self._write({"step": step, **values})
            self._show(step, "train", {**shown, "goodput": self.goodput()})
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

    def information(self, step: int, values: Values) -> None:
        """What features tell of pixels and of labels before a step, in nats, for TensorBoard and the trackers alone."""
        if self.is_main:
            self._show(step, "information", values)
            told = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            self._bar.write(f"step {step}  information of features on {told}")

    def saved(self, step: int, seconds: float) -> None:
        """A checkpoint of `step` made the training stand still for so long; the next logged step has it, too."""
        self.meter.saved(seconds)
        if self.is_main:
            self._bar.write(f"step {step}  checkpoint: training stood still for {seconds:.3f} s")

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """pixels: uint8 [H, W, 3]."""
        if self.is_main:
            self._board.add_image(name, pixels, step, dataformats="HWC")
            for tracker in self.trackers:
                tracker.picture(step, name, pixels)

    def goodput(self) -> float:
        """The share of all time since the run was first started that was spent in steps whose changes are in the
        weights now. Everything else counts against it: evaluations and checkpoints, starting, skipped steps, steps
        that were lost with a process or taken back, and the time between two attempts. (attempts.jsonl and the
        checkpoints remember what is needed across them.)"""
        kept = self.meter.kept_seconds
        return kept / max(time.time() - self._first_start, kept, 1e-9)  # the clock may have been set back

    def flush(self) -> None:
        """Metrics reach the disk before the checkpoint that continues them."""
        if self.is_main:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._board.flush()

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        values = {name: value for name, value in line.items() if isinstance(value, float)}
        self._show(line["step"], line.get("split", "train"), values)

    def _show(self, step: int, kind: str, values: Values) -> None:
        named = {f"{kind}/{name}": value for name, value in values.items()}
        for name, value in named.items():
            self._board.add_scalar(name, value, step)
        for tracker in self.trackers:
            tracker.scalars(step, named)

    def _eta(self, step: int) -> str:
        seconds = (time.monotonic() - self._started) / (step - self._start) * (self._total - step)
        return tqdm.format_interval(seconds)


def _brief(values: dict[str, float]) -> str:
    shown = {"loss": ".4f", "lr": ".2e", "grad_norm": ".3f", "images_per_second": ".0f", "data_wait": ".1%"}
    return "  ".join(f"{name} {values[name]:{form}}" for name, form in shown.items() if math.isfinite(values[name]))
