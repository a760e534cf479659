"""What a step of Shampoo costs beside one of AdamW, by part, and from which batch and world on that is 10 % more.

Both optimizers move the same model in turn, each repetition in the other order, by the gradients of one backward pass;
with the authors' settings, but preconditioned from the first step on. Parts of Shampoo: the factors (statistics of the
gradients), the directions (preconditioning and grafting), the roots, which are due every 100 steps, and the application
of the update. Seconds are medians; on a GPU after it is done.

Of the parts all but the application are shared by the ranks, so from what one process measures follows, for each
world, the batch a rank at which a step is 10 % longer than AdamW's. What goes over the wire for Shampoo (its updates;
under FSDP2 the gradients too) is not in that figure.

Prints a table, and appends a JSON line.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from torch import nn
from tqdm import tqdm

import pipeline.models  # noqa: F401 - registers our models with timm
from pipeline import optim
from pipeline.loss import SummedOverHeads
from pipeline.optim.precondition import accumulate, directions, renew_roots
from pipeline.optim.shampoo import Shampoo
from pipeline.recipe import Optimizer
from pipeline.recipe import Shampoo as Settings
from tools.benchmarks import ROOT, append, header

T = TypeVar("T")
WORLDS = (1, 2, 4, 8, 16, 32, 64)
OVERHEAD = 0.1
PARTS = ("gradients", "adamw", "factors", "directions", "roots", "apply")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vittm_tiny", metavar="NAME")
    parser.add_argument("--embed-dim", type=int, metavar="N", help="width, where it is not the model's own")
    parser.add_argument("--depth", type=int, metavar="N", help="likewise")
    parser.add_argument("--classes", type=int, default=1000, metavar="N", help="(default: 1000)")
    parser.add_argument("--image-size", type=int, default=224, metavar="N", help="in pixels (default: 224)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images of a step (default: 32)")
    parser.add_argument("--max-dim", type=int, default=8192, metavar="N", help="max_preconditioner_dim (default: 8192)")
    parser.add_argument("--repetitions", type=int, default=5, metavar="R", help="of each part (default: 5)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/shampoo.jsonl", metavar="FILE")
    options = parser.parse_args(arguments)
    if min(options.batch, options.repetitions) < 1:
        parser.error(f"batch {options.batch}, {options.repetitions} repetitions: both must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = header("shampoo", "tools/bench_shampoo.py", arguments, ("torch", "timm"))
    record["device"] = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    record["repetitions"] = options.repetitions
    seconds = Bench(make_model(options).to(device), options).run(options.repetitions)
    record["summary"] = summary(seconds, options.batch, Settings().precondition_frequency)
    report(record["summary"])
    append(record, options.output)
    return 0


def make_model(options: argparse.Namespace) -> nn.Module:
    given = {name: getattr(options, name) for name in ("embed_dim", "depth") if getattr(options, name) is not None}
    return timm.create_model(options.model, num_classes=options.classes, img_size=options.image_size, **given)


class Bench:
    def __init__(self, model: nn.Module, options: argparse.Namespace) -> None:
        self.model, self.criterion = model, SummedOverHeads("ce")
        groups = optim.group(model, layer_decay=1.0)
        self.adamw = optim.make_optimizer(model, Optimizer(), groups)
        settings = Settings(max_preconditioner_dim=options.max_dim, start_preconditioning_step=1)
        shampoo = optim.make_optimizer(model, Optimizer("shampoo", shampoo=settings), groups)
        assert isinstance(shampoo, Shampoo)
        self.shampoo = shampoo
        self.device = next(model.parameters()).device
        self.images = torch.randn(options.batch, 3, options.image_size, options.image_size, device=self.device)
        labels = torch.arange(options.batch, device=self.device) % options.classes
        self.targets = nn.functional.one_hot(labels, options.classes).float()
        self.seconds: dict[str, list[float]] = {}

    def run(self, repetitions: int) -> dict[str, float]:
        """Medians, after one repetition that is not counted."""
        for number in tqdm(range(repetitions + 1), desc="repetitions", leave=False):
            if number == 1:
                self.seconds.clear()
            self.model.zero_grad()
            self._timed("gradients", self._backward)
            turns = [lambda: self._timed("adamw", self.adamw.step), self._step_of_shampoo]
            for turn in turns if number % 2 else reversed(turns):
                turn()
        return {part: statistics.median(self.seconds[part]) for part in PARTS}

    def _backward(self) -> None:
        self.criterion(self.model(self.images), self.targets).backward()

    @torch.no_grad()
    def _step_of_shampoo(self) -> None:
        """Shampoo.step, part by part."""
        rows = self.shampoo.gradient_rows()
        gradients = self.shampoo.exchange.collect(rows)
        [batch] = self.shampoo.advance()
        mine = [gradients[block] for block in batch.blocks]
        self._timed("factors", lambda: accumulate(mine, batch.kept, batch.settings))
        self._timed("roots", lambda: renew_roots(batch.kept, batch.t, batch.settings))
        found = self._timed("directions", lambda: directions(batch.kept, batch.t, batch.settings))
        updates = dict(zip(batch.blocks, found, strict=True))
        self._timed("apply", lambda: self.shampoo.apply(self.shampoo.exchange.deliver(updates, rows)))

    def _timed(self, part: str, work: Callable[[], T]) -> T:
        self._wait()
        began = time.perf_counter()
        result = work()
        self._wait()
        self.seconds.setdefault(part, []).append(time.perf_counter() - began)
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def summary(seconds: dict[str, float], batch: int, frequency: int) -> dict[str, Any]:
    """seconds: of every part, measured at `batch` images; roots are due every `frequency` steps."""
    shared = seconds["factors"] + seconds["directions"] + seconds["roots"] / frequency
    adamw = seconds["gradients"] + seconds["adamw"]
    more = shared + seconds["apply"] - seconds["adamw"]
    image = seconds["gradients"] / batch
    batches = {world: batch_for(shared / world + seconds["apply"], seconds["adamw"], image) for world in WORLDS}
    return {
        "batch": batch,
        "seconds": {part: round(value, 6) for part, value in seconds.items()},
        "step": {"adamw": round(adamw, 6), "shampoo": round(adamw + more, 6), "overhead": round(more / adamw, 4)},
        "batch_a_rank_for_10_percent": batches,
    }


def batch_for(shampoo: float, adamw: float, image: float) -> int:
    """The batch at which a step with Shampoo is 10 % longer than one with AdamW, from what both take of a step beside
    the gradients of so many images: shampoo + batch image = 1.1 (adamw + batch image)."""
    return max(1, math.ceil((shampoo - (1 + OVERHEAD) * adamw) / (OVERHEAD * image)))


def report(found: dict[str, Any]) -> None:
    print(f"{'seconds of a step':<24}{'batch ' + str(found['batch']):>12}")
    for part, value in found["seconds"].items():
        print(f"{part:<24}{value:>12.4f}")
    step = found["step"]
    print(f"step: AdamW {step['adamw']:.4f} s, Shampoo {step['shampoo']:.4f} s, {step['overhead']:.1%} more")
    print("the batch a rank at which it is 10 % more, by world, without communication:")
    print("  ".join(f"{world}: {batch}" for world, batch in found["batch_a_rank_for_10_percent"].items()))


if __name__ == "__main__":
    sys.exit(main())
