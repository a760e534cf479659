"""What is done about steps that go wrong: losses and gradient norms that are not finite, and losses that leap up."""

import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.backend import Stepped, World
from pipeline.data.batch import Batch
from shards.durable import replace_text
from shards.errors import UserError

SKIPPED = "skipped.jsonl"
WINDOW, FEWEST = 50, 10


class Spikes:
    """A loss over `factor` times the median of the last WINDOW (at least FEWEST) is a spike; 0 never sees one."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def limit(self) -> float:
        """What no loss may exceed now."""
        seen = self.factor and len(self.losses) >= FEWEST
        return self.factor * median(self.losses) if seen else float("inf")

    def met(self, loss: float) -> bool:
        """Whether the loss of a step is a spike; where it is none, it counts for what is one later."""
        if loss > self.limit():
            return True
        self.losses.append(loss)
        return False

    def resume(self, losses: Sequence[float]) -> None:
        """Goes on with the losses of a checkpoint."""
        self.losses.clear()
        self.losses.extend(losses)


class Skips:
    """RUN/skipped.jsonl: a line for every step that changed nothing, or whose changes were taken back, with its samples
    in the order of the global batch, written by rank 0. The budget is on such steps of the whole run; all ranks call
    every method."""

    def __init__(self, run_dir: Path, world: World, budget: int) -> None:
        self._path, self._world, self._budget = run_dir / SKIPPED, world, budget
        self._lines: list[dict[str, Any]] = []

    @property
    def latest(self) -> int:
        """The last step that was skipped; 0 for none."""
        return self._lines[-1]["step"] if self._lines else 0

    def resume(self, step: int) -> None:
        """Takes up what was skipped up to `step`; what came later will be met again."""
        lines = [json.loads(text) for text in self._path.read_text().splitlines()] if self._path.exists() else []
        self._lines = self._world.from_main([line for line in lines if line["step"] <= step])
        if self._world.is_main and len(lines) > len(self._lines):
            self._write()

    def note(self, step: int, stepped: Stepped, batches: Sequence[Batch], outcome: str) -> None:
        """What became of `step`, and this rank's micro-batches of it.

        Raises UserError, on all ranks, where more steps were skipped than the budget allows.
        """
        samples = self._world.gather([sample for batch in batches for sample in batch.ids.tolist()])
        # As text: JSON has no word for what is not finite.
        line = {"step": step, "loss": str(stepped.loss.item()), "grad_norm": str(stepped.grad_norm.item())}
        line |= {"outcome": outcome, "samples": [sample for rank in samples for sample in rank]}
        self._lines.append(line)
        if self._world.is_main:
            print(f"step {step}: loss {line['loss']}, gradient norm {line['grad_norm']}: {outcome}", flush=True)
            self._write()
        self._check()

    def _check(self) -> None:
        if len(self._lines) <= self._budget:
            return
        last = self._lines[-1]
        raise UserError(
            f"the loss is {last['loss']} and the gradient norm {last['grad_norm']} at step {last['step']}, "
            f"number {len(self._lines)} of the steps that had to be skipped, and runtime.max_skipped allows "
            f"{self._budget}: training has diverged; the checkpoints before it hold finite weights, and {self._path} "
            "names the samples of those steps: look at them, lower --schedule.lr, lengthen --schedule.warmup or clip "
            "harder, in a new --run-dir"
        )

    def _write(self) -> None:
        replace_text(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))
