"""How fast our models are beside one of timm: latency, and a training step.

A ViTTM has the width and depth of its ViT; T2T-ViT-14 has about the parameters of ViT-S; LTM is its base at ratio 0.8.

Both models of a pair take turns on the same images, a forward pass each in eval mode, and a step of each: forward,
backward, AdamW, as the recipes train (the loss of both heads of ViTTM). The first turn does not count. On CUDA each
pass ends in a synchronisation, and the peak of the allocated memory is recorded too.

Prints a table, and appends a JSON line. On a GPU:
--device cuda --precision bf16 --compile --batches 1 16 256 --train-batch 128 --threads 1
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import pipeline.models  # noqa: F401 - registers our models with timm
from pipeline.loss import SummedOverHeads
from pipeline.optim import adamw
from tools.benchmarks import ROOT, alternate, append, header

PEERS = {
    "vittm_small": "vit_small_patch16_224",
    "vittm_base": "vit_base_patch16_224",
    "t2t_vit_14": "vit_small_patch16_224",
    "t2t_vit_t_14": "vit_small_patch16_224",
    "ltm_vit_small": "vit_small_patch16_224",
    "ltm_vit_base": "vit_base_patch16_224",
    "ltm_swin_tiny": "swin_tiny_patch4_window7_224",
    "ltm_mobilevit_s": "mobilevit_s",
    "ltm_efficientvit_b1": "efficientvit_b1",
}
PACKAGES = ("torch", "timm")
Pass = Callable[[], object]
Make = Callable[[nn.Module], Pass]
IMAGE_SIZE, NUM_CLASSES = 224, 1000


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    options = parser.parse_args(arguments)
    numbers = [*options.batches, *options.threads, options.train_batch, options.repetitions]
    if min(numbers) < 1:
        parser.error(f"batches, threads and repetitions are {numbers}: each must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no CUDA device here: leave --device out")
    bench = Bench(torch.device(options.device), options.precision == "bf16", options.compile, options.repetitions)
    record = header("model", "tools/bench_model.py", arguments, PACKAGES)
    if bench.device.type == "cuda":
        record["hardware"] += f"; {torch.cuda.get_device_name()}"
    record["repetitions"] = options.repetitions
    print(f"{'milliseconds':<40}{'ours':>10}{'timm':>10}{'ratio':>8}{'from':>8}{'to':>8}")
    record["summary"] = {
        name: {
            "latency": [bench.latency(name, batch, n) for n in options.threads for batch in options.batches],
            "step": [bench.step(name, options.train_batch, n) for n in options.threads],
        }
        for name in options.models
    }
    append(record, options.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], metavar="B", help="of latency")
    parser.add_argument("--train-batch", type=int, default=16, metavar="B", help="of the training step")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="of the CPU")
    parser.add_argument("--repetitions", type=int, default=7, metavar="R", help="of each pass (default: 7)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/model.jsonl", metavar="FILE")
    return parser


@dataclass(frozen=True)
class Bench:
    device: torch.device
    bf16: bool
    compiled: bool
    repetitions: int

    def latency(self, name: str, batch: int, threads: int) -> dict[str, Any]:
        """Of a forward pass in eval mode."""
        images = self._images(batch)

        def passing(model: nn.Module) -> Pass:
            model.eval()

            @torch.inference_mode()
            def run() -> object:
                with self._autocast():
                    return model(images)

            return run

        return self._compare(name, "latency", batch, threads, passing)

    def step(self, name: str, batch: int, threads: int) -> dict[str, Any]:
        """Of an optimizer step as the recipes make it."""
        images, criterion = self._images(batch), SummedOverHeads("ce")
        targets = torch.full((batch, NUM_CLASSES), 1 / NUM_CLASSES, device=self.device)

        def stepping(model: nn.Module) -> Pass:
            optimizer = adamw(model.train(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.03)

            def run() -> None:
                with self._autocast():
                    outputs = model(images)
                criterion(outputs, targets).backward()
                optimizer.step()
                optimizer.zero_grad()

            return run

        return self._compare(name, "step", batch, threads, stepping)

    def _compare(self, name: str, what: str, batch: int, threads: int, make: Make) -> dict[str, Any]:
        torch.set_num_threads(threads)
        turns = self._turns((name, PEERS[name]), make)
        cuda = self.device.type == "cuda"
        peaks = {kind: self._peak(kind, make) for kind in (name, PEERS[name])} if cuda else {}
        return _report(name, {"what": what, "batch": batch, "threads": threads}, turns, peaks)

    def _turns(self, kinds: Sequence[str], make: Make) -> dict[str, list[float]]:
        passes = {kind: make(self._model(kind)) for kind in kinds}
        return alternate({kind: partial(self._whole, run) for kind, run in passes.items()}, self.repetitions)

    def _peak(self, kind: str, make: Make) -> int:
        """Most bytes allocated in the second pass of a model that is alone on the device."""
        run = make(self._model(kind))
        self._whole(run)
        torch.cuda.reset_peak_memory_stats()
        self._whole(run)
        return torch.cuda.max_memory_allocated()

    def _whole(self, run: Pass) -> None:
        """A pass, until the device is done with it."""
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _model(self, name: str) -> nn.Module:
        model = timm.create_model(name, num_classes=NUM_CLASSES).to(self.device)
        if self.compiled:
            model.compile()
        return model

    def _images(self, batch: int) -> torch.Tensor:
        return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def _report(name: str, about: dict, seconds: dict[str, list[float]], peaks: dict[str, int]) -> dict[str, Any]:
    """Medians in milliseconds, their ratio timm / ours, and the lowest and highest ratio of a turn."""
    ours, theirs = name, PEERS[name]
    medians = {kind: statistics.median(values) * 1000 for kind, values in seconds.items()}
    turns = [theirs_took / ours_took for ours_took, theirs_took in zip(seconds[ours], seconds[theirs], strict=True)]
    ratios = {"ratio": medians[theirs] / medians[ours], "lowest": min(turns), "highest": max(turns)}
    title = f"{name}, {about['what']}, batch {about['batch']}, {about['threads']} threads"
    columns = (
        *(f"{medians[kind]:>10.1f}" for kind in (ours, theirs)),
        *(f"{ratio:>8.2f}" for ratio in ratios.values()),
    )
    print(f"{title:<40}", *columns, sep="", flush=True)
    found = {"ms": {kind: round(median, 2) for kind, median in medians.items()}}
    memory = {"peak_bytes": peaks} if peaks else {}
    return {**about, **found, **{key: round(ratio, 3) for key, ratio in ratios.items()}, **memory}


if __name__ == "__main__":
    sys.exit(main())
