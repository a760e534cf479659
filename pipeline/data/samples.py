"""Requests to batches, in a worker: a map without a position."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from pipeline.data.batch import PADDING, UNREADABLE, Batch, Replaced, Request
from shards.errors import UserError
from shards.keyed import uniforms
from shards.reader import BadSample, Reader

TRANSFORM_STREAM = 0
ERASING_STREAM = 1
_SUBSTITUTE_STREAM = 2
_MAX_SUBSTITUTES = 16


class Transform(Protocol):
    """Bytes of an image and its uniform draws -> uint8 [S, S, 3]."""

    @property
    def image_size(self) -> int: ...

    @property
    def num_draws(self) -> int: ...

    def __call__(self, data: bytes, draws: np.ndarray) -> np.ndarray: ...


class Samples(Dataset):
    """A map from a Request to its Batch.

    `substitutes`: a bad sample is replaced by another one of the split, which (seed, epoch, sample) decide, and which
    is then treated as the planned one would have been; otherwise its image is blank and its label UNREADABLE.
    """

    def __init__(self, reader: Reader, transform: Transform, seed: int, substitutes: bool) -> None:
        self.reader = reader
        self.transform = transform
        self.seed = seed
        self.substitutes = substitutes

    def __getitem__(self, request: Request) -> Batch | UserError:
        """An error is handed over like a batch: raised in a worker it would arrive with the worker's traceback."""
        try:
            return self._batch(request)
        except UserError as error:
            return error

    def _batch(self, request: Request) -> Batch:
        draws = uniforms(self.seed, request.epoch, request.ids, TRANSFORM_STREAM, self.transform.num_draws)
        bad: list[Replaced] = []
        samples = [
            self._sample(sample, row, request.epoch, bad) if sample != PADDING else self._blank()
            for sample, row in zip(request.ids.tolist(), draws, strict=True)
        ]
        images, labels = (list(values) for values in zip(*samples, strict=True))
        return Batch(
            default_collate(images).permute(0, 3, 1, 2),  # in a worker, straight into the memory shared with the trainer
            torch.tensor(labels, dtype=torch.int64),
            torch.from_numpy(request.ids),
            request.first,
            request.step,
            request.epoch,
            tuple(bad),
        )

    def _sample(self, sample: int, draws: np.ndarray, epoch: int, bad: list[Replaced]) -> tuple[Tensor, int]:
        errors: list[BadSample] = []
        for candidate in self._candidates(sample, epoch):
            try:
                image, label = self.reader.read(candidate, lambda data: self.transform(data, draws))
            except BadSample as error:
                errors.append(error)
            else:
                bad += [Replaced(error, candidate) for error in errors]
                return torch.from_numpy(image), label
        if self.substitutes:
            raise UserError(
                f"sample {sample} and {_MAX_SUBSTITUTES} substitutes of it are bad: most of the split is unreadable. "
                f"The first: {errors[0]}"
            )
        bad += [Replaced(error, PADDING) for error in errors]
        return self._blank()

    def _blank(self) -> tuple[Tensor, int]:
        side = self.transform.image_size
        return torch.zeros(side, side, 3, dtype=torch.uint8), UNREADABLE

    def _candidates(self, sample: int, epoch: int) -> Iterator[int]:
        yield sample
        if self.substitutes:
            draws = uniforms(self.seed, epoch, np.array([sample]), _SUBSTITUTE_STREAM, _MAX_SUBSTITUTES)
            yield from (draws[0] * len(self.reader)).astype(int).tolist()
