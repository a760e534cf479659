"""How long a checkpoint makes the training stand still: asynchronous and at once, beside the copy to memory alone.

    python tools/bench_checkpoint.py
    accelerate launch --config_file ds_configs/fsdp_gpu8.yaml tools/bench_checkpoint.py --model vittm_large

The model has taken one step of AdamW, and has an average. Every save is flushed and hashed below --directory, which
should be on the disk that runs are on. A figure is the median of the repetitions, each the slowest rank's; "behind" is
how long the commit goes on after the training does. Prints a table, and appends a JSON line.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

import pipeline.models  # noqa: F401 - registers our models with timm
from pipeline.backend import Backend, StepOptions, World, start, wrap
from pipeline.checkpoint import Checkpoints
from pipeline.ema import EMA
from pipeline.loss import SummedOverHeads
from pipeline.optim import adamw
from pipeline.sharded import Shard, in_memory
from pipeline.trainer import leave
from tools.benchmarks import ROOT, append, header

BATCH, DECAY = 2, 0.999
FIGURES = ("copy alone", "asynchronous", "behind", "at once")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _options(arguments)
    world = start(options.device)
    record = header("checkpoint", "tools/bench_checkpoint.py", arguments, ("torch",)) if world.is_main else {}
    backend, ema = make(world, options.model, options.image_size)
    root = Path(world.from_main(tempfile.mkdtemp(dir=options.directory) if world.is_main else ""))
    try:
        rounds = [Bench(world, backend, ema, root).round(number) for number in range(options.repetitions)]
        num_bytes = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    finally:
        world.barrier()
        if world.is_main:
            shutil.rmtree(root)
    summary = {name: round(statistics.median(found[name] for found in rounds), 4) for name in FIGURES}
    if world.is_main:
        record |= {"repetitions": options.repetitions, "world": world.size, "strategy": world.strategy}
        record |= {"device": world.device.type, "bytes": num_bytes, "summary": summary}
        append(record, options.output)
        print(f"{num_bytes / 1e6:,.1f} MB of {options.model}, {world.strategy} on {world.size} x {world.device.type}")
        print("\n".join(f"{name:<14}{seconds:>9.3f} s" for name, seconds in summary.items()), flush=True)
    backend.close()
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="vittm_base", metavar="NAME", help="of timm's registry (default: %(default)s)")
    add("--image-size", type=int, default=224, metavar="PX", help="default: %(default)s")
    add("--repetitions", type=int, default=5, metavar="R", help="default: %(default)s")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    add("--directory", type=Path, metavar="DIR", help="where checkpoints are written (default: the system's for such)")
    add("--output", type=Path, default=ROOT / "benchmarks/checkpoint.jsonl", metavar="FILE")
    options = parser.parse_args(arguments)
    if options.repetitions < 1:
        parser.error(f"--repetitions {options.repetitions}: at least 1")
    return options


def make(world: World, name: str, image_size: int) -> tuple[Backend, EMA]:
    """A model with all of its states."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=image_size)
    backend = wrap(world, model, lambda m: adamw(m, (0.9, 0.999), 1e-8, 0.0), StepOptions(BATCH * world.size))
    ema = EMA(backend, DECAY)
    images = torch.randn(BATCH, 3, image_size, image_size, device=world.device)
    classes: int = model.num_classes  # type: ignore[assignment]
    targets = torch.full((BATCH, classes), 1 / classes, device=world.device)
    backend.step(SummedOverHeads("ce"), [(images, targets)])
    ema.update()
    return backend, ema


@dataclass(frozen=True)
class Bench:
    world: World
    backend: Backend
    ema: EMA
    root: Path

    def round(self, number: int) -> dict[str, float]:
        """Seconds of each figure."""
        found = {"copy alone": self._timed(self._copy)}
        for name in ("asynchronous", "at once"):
            checkpoints = Checkpoints(self.root / name, self.world.apart(), keep=1, asynchronous=name == "asynchronous")
            found[name] = self._timed(lambda: checkpoints.save(number, self.backend, {"ema": self.ema.state()}, {}))  # noqa: B023
            behind = self._timed(checkpoints.wait)
            if checkpoints.asynchronous:
                found["behind"] = behind
        return found

    def _copy(self) -> tuple[object, list[Shard]]:
        return self.backend.stage_engine(), in_memory(self.ema.state())

    def _timed(self, work: Callable[[], object]) -> float:
        """Seconds of the slowest rank, all of which begin together and when their device is idle."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        self.world.barrier()
        began = time.perf_counter()
        work()
        return max(self.world.gather(time.perf_counter() - began))


if __name__ == "__main__":
    leave(main())
