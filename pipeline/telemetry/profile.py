"""A trace of a few training steps, by torch.profiler."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from pipeline.backend import World
from shards.errors import UserError

BEFORE = 3
"""Steps of a start that are not in the trace: the first are slow, and the last of them warms the profiler up."""
_ROWS = 20


class Profile:
    """RUN/profile/rank-N.json.gz of `steps` steps (0: nothing), a Chrome trace, and rank-N.txt, what they spent most
    time on; rank 0 prints that, too. Every rank has its own."""

    def __init__(self, steps: int, run_dir: Path, world: World) -> None:
        self._steps, self._directory, self._world = steps, run_dir / "profile", world
        self._running: profile | None = None

    def check(self, left: int) -> None:
        """Raises UserError where so few steps are left that not all that were asked for would be in the trace."""
        needed = BEFORE + self._steps
        if self._steps and 0 < left < needed:
            raise UserError(
                f"profile {self._steps} traces as many steps after {BEFORE} others, but only {left} steps are left to "
                f"train: give --profile {left - BEFORE} or less, or none"
                if left > BEFORE
                else f"profile {self._steps} leaves {BEFORE} steps out, and only {left} are left to train: give none"
            )

    @contextmanager
    def open(self) -> Iterator[None]:
        """Around the steps, of which each ends with a call of `step`."""
        if not self._steps:
            yield
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._world.device.type == "cuda")
        phases = schedule(wait=BEFORE - 1, warmup=1, active=self._steps, repeat=1)
        with profile(activities=activities, schedule=phases, on_trace_ready=self._write) as self._running:
            yield

    def step(self) -> None:
        if self._running:
            self._running.step()

    def _write(self, done: profile) -> None:
        self._directory.mkdir(exist_ok=True)
        path = self._directory / f"rank-{self._world.rank}.json.gz"
        done.export_chrome_trace(str(path))
        column = "self_cpu_time_total" if self._world.device.type == "cpu" else "self_device_time_total"
        table = done.key_averages().table(sort_by=column, row_limit=_ROWS)
        path.with_name(f"rank-{self._world.rank}.txt").write_text(table)
        if self._world.is_main:
            print(f"{table}\nprofile of {self._steps} steps: {path} (chrome://tracing, ui.perfetto.dev)", flush=True)
