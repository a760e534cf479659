"""The samples of a request, read and transformed in a worker, which holds no position."""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from pipeline.data.batch import PADDING, UNREADABLE, Filled, Replaced, Request
from shards.errors import UserError
from shards.keyed import uniforms
from shards.reader import BadSample

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


class Readable(Protocol):
    """The samples of a split by their ids: `shards.reader.Reader`, or one of files."""

    def __len__(self) -> int: ...

    def read(self, sample_id: int, decode: Callable[[bytes], np.ndarray], /) -> tuple[np.ndarray, int]: ...


R_co = TypeVar("R_co", bound=Readable, covariant=True)


class Samples(Generic[R_co]):
    """Reads and transforms the samples of a Request into the memory that is given for them.

    `substitutes`: a bad sample is replaced by another one of the split, which (seed, epoch, sample) decide, and which
    is then treated as the planned one would have been; otherwise its image is blank and its label UNREADABLE.
    `later`: transforms that take the place of the one before, each after the epoch from which on it does.
    """

    def __init__(
        self,
        reader: R_co,
        transform: Transform,
        seed: int,
        substitutes: bool,
        later: Sequence[tuple[int, Transform]] = (),
    ) -> None:
        self.reader = reader
        self.transform = transform
        self.seed = seed
        self.substitutes = substitutes
        self.later = tuple(later)

    def transform_at(self, epoch: int) -> Transform:
        return [self.transform, *(transform for begins, transform in self.later if begins <= epoch)][-1]

    def image_size_at(self, epoch: int) -> int:
        return self.transform_at(epoch).image_size

    @property
    def largest(self) -> int:
        """Side of the largest images."""
        return max(transform.image_size for transform in (self.transform, *(each for _, each in self.later)))

    def fill(self, request: Request, images: np.ndarray) -> Filled:
        """Reads the samples of the request; their pixels go into `images` uint8 [B, S, S, 3], with the S of its epoch.

        Raises StoreError, and UserError for a sample whose substitutes are all bad.
        """
        transform = self.transform_at(request.epoch)
        draws = uniforms(self.seed, request.epoch, request.ids, TRANSFORM_STREAM, transform.num_draws)
        bad: list[Replaced] = []
        labels = np.full(len(request.ids), UNREADABLE)
        for place, sample in enumerate(request.ids.tolist()):
            image = None
            if sample != PADDING:
                image, labels[place] = self._sample(sample, draws[place], request.epoch, bad)
            images[place] = 0 if image is None else image
        return Filled(labels, tuple(bad))

    def _sample(self, sample: int, draws: np.ndarray, epoch: int, bad: list[Replaced]) -> tuple[np.ndarray | None, int]:
        """The image, None for a bad one that nothing replaces, and its label."""
        errors: list[BadSample] = []
        transform = self.transform_at(epoch)
        for candidate in self._candidates(sample, epoch):
            try:
                image, label = self.reader.read(candidate, lambda data: transform(data, draws))
            except BadSample as error:
                errors.append(error)
            else:
                bad += [Replaced(error, candidate) for error in errors]
                return image, label
        if self.substitutes:
            raise UserError(
                f"sample {sample} and {_MAX_SUBSTITUTES} substitutes of it are bad: most of the split is unreadable. "
                f"The first: {errors[0]}"
            )
        bad += [Replaced(error, PADDING) for error in errors]
        return None, UNREADABLE

    def _candidates(self, sample: int, epoch: int) -> Iterator[int]:
        yield sample
        if self.substitutes:
            draws = uniforms(self.seed, epoch, np.array([sample]), _SUBSTITUTE_STREAM, _MAX_SUBSTITUTES)
            yield from (draws[0] * len(self.reader)).astype(int).tolist()
