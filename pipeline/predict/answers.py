"""What a model makes of images: their classes, and their features.

Shapes: B images, C classes, D width, S side of an image.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.data.batch import Batch, Request
from pipeline.data.loading import Loading, load
from pipeline.data.samples import Samples
from pipeline.evaluate import names_of_heads
from pipeline.loss import heads_of
from pipeline.predict.checkpoint import Checkpoint
from pipeline.predict.find import load_checkpoint
from shards.crop import to_rgb
from shards.errors import UserError
from shards.files_reader import FilesReader
from shards.reader import BadSample

Picture = str | Path | bytes | Image.Image
Answer = dict[str, Any]


def predict(checkpoint: str | Path | Checkpoint, image: Picture, top_k: int = 1) -> Answer:
    """{"pred_class": name, "pred_label": number, "pred_score": softmax} of an image's likeliest class, by the memory
    head of a ViTTM; with `top_k` > 1 also "top", a list of such dicts, likeliest first. A class without a name has its
    number as text. The keys mean what they mean in mmpretrain.

    `checkpoint`: as `load_checkpoint` takes it, or what that gave, so that it is loaded once. `image`: a path, the
    bytes of a file, or an image of Pillow's. Raises UserError as `load_checkpoint`, and for an image that cannot be
    read.
    """
    asked = _loaded(checkpoint)
    return answers(asked, _stack(asked, [image]), top_k)[0]


def features(checkpoint: str | Path | Checkpoint, images: Sequence[Picture]) -> dict[str, Tensor]:
    """Head -> what its classifier sees, float [B, D] on the model's device: the pooled and normed tokens, by timm's
    `forward_head(pre_logits=True)`. The heads are "memory" and "process" of a ViTTM, else "head". Arguments and
    UserErrors as of `predict`."""
    asked = _loaded(checkpoint)
    return pooled(asked, _stack(asked, images))


def answers(asked: Checkpoint, images: Tensor, top_k: int = 1) -> list[Answer]:
    """`predict` of each of the images uint8 [B, 3, S, S]."""
    check_classifier(asked)
    with torch.no_grad():
        logits = heads_of(asked.model(asked.view.normalise(images)))[0]
    scores, labels = logits.float().softmax(dim=1).topk(min(top_k, asked.num_classes), dim=1)
    found = []
    for row in zip(labels.tolist(), scores.tolist(), strict=True):
        top = [_answer(asked, label, score) for label, score in zip(*row, strict=True)]
        found.append(top[0] | ({"top": top} if top_k > 1 else {}))
    return found


def pooled(asked: Checkpoint, images: Tensor) -> dict[str, Tensor]:
    """`features` of the images uint8 [B, 3, S, S]."""
    model: Any = asked.model
    with torch.no_grad():
        tokens = heads_of(model.forward_features(asked.view.normalise(images)))
        found = heads_of(model.forward_head(*tokens, pre_logits=True))
    return dict(zip(names_of_heads(model), found, strict=True))


def check_classifier(asked: Checkpoint) -> None:
    """Raises UserError for a model that has no classes."""
    if not asked.num_classes:
        raise UserError(f"{asked.name} has no classifier, only features: ask for these (--features)")


@contextmanager
def opened(asked: Checkpoint, files: FilesReader, batch: int, loading: Loading) -> Iterator[Iterator[Batch]]:
    """The images of the files in their order, up to `batch` at once; those that cannot be read are in `bad`."""
    samples = Samples(files, asked.view.transform, 0, substitutes=False)
    ids = np.arange(len(files))
    requests = (Request(part, 0, 0, 0) for part in np.split(ids, range(batch, len(ids), batch)))
    with load(samples, requests, loading, batch) as batches:
        yield batches


def answered(asked: Checkpoint, batches: Iterable[Batch], top_k: int = 1) -> Iterator[Answer | BadSample]:
    """`predict` of each image of the batches, in their order, or why it could not be read."""
    for batch in batches:
        bad = {replaced.error.sample: replaced.error for replaced in batch.bad}
        for sample, answer in zip(batch.ids.tolist(), answers(asked, batch.images, top_k), strict=True):
            yield bad.get(sample, answer)


def _loaded(checkpoint: str | Path | Checkpoint) -> Checkpoint:
    return checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)


def _stack(asked: Checkpoint, images: Sequence[Picture]) -> Tensor:
    """uint8 [B, 3, S, S] on the model's device."""
    pixels = np.stack([_pixels(asked, image) for image in images])
    device = next(asked.model.parameters()).device
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)


def _pixels(asked: Checkpoint, image: Picture) -> np.ndarray:
    """uint8 [S, S, 3]."""
    name = str(image) if isinstance(image, str | Path) else "the image"
    try:
        if isinstance(image, Image.Image):
            return asked.view.transform.pixels(to_rgb(image))
        return asked.view.transform(image if isinstance(image, bytes) else Path(image).read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name} cannot be read: {reason}; give a JPEG, PNG or WebP") from error


def _answer(asked: Checkpoint, label: int, score: float) -> Answer:
    return {"pred_class": asked.class_name(label), "pred_label": label, "pred_score": score}
