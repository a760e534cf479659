"""Top-1 and top-5 of every head, every sample counted once on any number of ranks."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.augment.device import normalise
from pipeline.backend import Stopped, World
from pipeline.data.batch import PADDING, UNREADABLE, Batch
from pipeline.data.stream import arriving
from pipeline.loss import heads_of

Variants = Mapping[str, Callable[[], AbstractContextManager]]


class Engine(Protocol):
    """The part of a Backend that is needed here."""

    @property
    def world(self) -> World: ...
    @property
    def module(self) -> nn.Module: ...
    def autocast(self) -> AbstractContextManager: ...


class Judge(Protocol):
    """Another figure of each head: a float [B] of logits float [B, C] and their batch, 0 where an image is unreadable;
    its sum over all ranks is divided by `num_samples`."""

    @property
    def num_samples(self) -> int: ...
    def __call__(self, logits: Tensor, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a backend's model and its variants (prefix of the metric's name -> context that swaps weights in).

    `judges`: more figures, by name; `normalise`: uint8 [B, 3, H, W] to what the model takes."""

    backend: Engine
    head_names: tuple[str, ...]
    variants: Variants
    num_samples: int
    judges: Mapping[str, Judge] = field(default_factory=dict)
    normalise: Callable[[Tensor], Tensor] = normalise

    def __call__(self, batches: Iterable[Batch]) -> dict[str, float] | None:
        """{"memory_top1": .., "memory_top5": .., "memory_loss": .., ..., "unreadable": ..}: shares of the split's
        samples, and the mean cross-entropy of unsmoothed labels; None where a rank was told to stop before the end.
        "unreadable" images are a number: they count as wrong, and are left out of the cross-entropy.

        Raises RuntimeError unless exactly `num_samples` samples were counted.
        """
        module = self.backend.module
        was_training = module.training
        module.eval()
        totals: dict[str, Tensor] = {}
        try:
            for batch in arriving(batches, self.backend.world, "evaluation"):
                self._add(totals, batch)
        except Stopped:
            return None
        finally:
            module.train(was_training)
        return self._reduce(totals)

    @torch.no_grad()
    def _add(self, totals: dict[str, Tensor], batch: Batch) -> None:
        known = batch.ids != PADDING
        kept = known.to(batch.labels.device)
        images, labels = self.normalise(batch.images), batch.labels
        for prefix, variant in self.variants.items():
            with variant(), self.backend.autocast():
                outputs = heads_of(self.backend.module(images))
            for name, logits in zip(self.head_names, outputs, strict=True):
                judged = [judge(logits, batch) for judge in self.judges.values()]
                counts = torch.stack([*_scores(logits.float(), labels), *judged])[:, kept].double().sum(dim=1)
                totals[prefix + name] = totals.get(prefix + name, 0) + counts
        counted = torch.tensor([known.sum(), len(batch.bad)], dtype=torch.float64)  # on the CPU: it waits for no device
        totals["samples"] = totals.get("samples", 0) + counted

    def _reduce(self, totals: dict[str, Tensor]) -> dict[str, float]:
        counted = totals.pop("samples")
        local = [*counted.tolist(), *(count for counts in totals.values() for count in counts.tolist())]
        samples, unreadable, *sums = self.backend.world.sum(local)
        if samples != self.num_samples:
            raise RuntimeError(
                f"evaluation counted {samples:.0f} samples, but the split holds {self.num_samples}: its figures would "
                "be wrong; this is a defect of the stream, please report it with the launch command"
            )
        counts = {"top1": samples, "top5": samples, "loss": max(1.0, samples - unreadable)}
        counts |= {name: judge.num_samples for name, judge in self.judges.items()}
        keys = [(f"{name}_{count}", number) for name in totals for count, number in counts.items()]
        values = {key: total / number for (key, number), total in zip(keys, sums, strict=True)}
        return values | {"unreadable": unreadable}


def _scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the label is first, and among the first five, and its cross-entropy; each float [B]."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (ranked == labels[:, None]).float()
    return hits[:, 0], hits.sum(dim=1), F.cross_entropy(logits, labels, ignore_index=UNREADABLE, reduction="none")


def head_names(model: nn.Module) -> tuple[str, ...]:
    """What a model calls its heads, made to return all of them in evaluation."""
    if hasattr(model, "eval_head"):
        setattr(model, "eval_head", "both")  # noqa: B010 - nn.Module's own attributes are typed as tensors
    return names_of_heads(model)


def names_of_heads(model: nn.Module) -> tuple[str, ...]:
    """ "memory" and "process" of ViTTM, "head" of a model with one."""
    return ("memory", "process") if hasattr(model, "eval_head") else ("head",)
