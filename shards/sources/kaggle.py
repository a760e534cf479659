"""ImageNet-1k as Kaggle gives it: ILSVRC/Data/CLS-LOC/{train/<wnid>/*.JPEG, val/*.JPEG}, and val's labels beside."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.classes import check_classes, read_lines, some
from shards.errors import UserError
from shards.sources.base import Entry, Rejected, is_image_name
from shards.sources.fetch import WholeFiles
from shards.sources.folders import ClassFolders, entry_of, visible

LABELS, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
_HEADER = "ImageId,PredictionString"
_INSIDE = Path("ILSVRC", "Data", "CLS-LOC")


@dataclass(frozen=True)
class Kaggle:
    """`path` holds ILSVRC, or is ILSVRC, or any folder down to CLS-LOC; the labels lie in one of those.

    The splits are train and val, or the one of them that is there. `classes` are the wnids of both.
    """

    path: str
    classes: tuple[str, ...]

    in_order = False
    p_rule = None

    def scan(self) -> Iterator[Entry | Rejected]:
        """UserError for another layout, wrong classes, val without its labels, and labels without their image.

        An image without a label is Rejected.
        """
        images = _images(Path(os.path.abspath(self.path)))
        train, val = images / "train", images / "val"
        if (mapping := _beside(images, MAPPING)).is_file():
            lines = read_lines(mapping, "a line a class: its wnid, then its words")
            check_classes((line.split(" ")[0] for line in lines), self.classes, ascii(str(mapping)))
        # Labels first: what is wrong with them shows before a million files are listed.
        labels = _read_labels(_beside(images, LABELS), self.classes) if val.is_dir() else {}
        if train.is_dir():
            yield from ClassFolders(str(train), "train", self.classes).scan()
        if val.is_dir():
            yield from _scan_val(str(val), labels)

    def fetcher(self) -> WholeFiles:
        return WholeFiles()


def _images(path: Path) -> Path:
    """The folder that holds train and val."""
    parts = _INSIDE.parts
    for images in (path.joinpath(*parts[depth:]) for depth in range(len(parts) + 1)):
        if (images / "train").is_dir() or (images / "val").is_dir():
            return images
    raise UserError(
        f"{str(path)!a} holds neither {_INSIDE}/train nor {_INSIDE}/val; extract Kaggle's archive "
        "(imagenet-object-localization-challenge) and give the folder that holds ILSVRC"
    )


def _beside(images: Path, name: str) -> Path:
    """The file in the folder of the images or one of the three above it; its usual place where it is in none."""
    places = [folder / name for folder in (images, *images.parents)[: len(_INSIDE.parts) + 1]]
    return next((place for place in places if place.is_file()), places[-1])


def _read_labels(path: Path, classes: tuple[str, ...]) -> dict[str, str]:
    """The wnid of each image of val, by its name without suffix."""
    if not path.is_file():
        raise UserError(f"the labels of val are missing: there is no {str(path)!a}; put Kaggle's {LABELS} there")
    lines = read_lines(path, f"Kaggle's {LABELS}")
    if not lines or lines[0] != _HEADER:
        raise UserError(f"{str(path)!a} does not begin with the line {_HEADER}; download Kaggle's {LABELS} again")
    labels: dict[str, str] = {}
    for number, line in enumerate(lines[1:], 2):
        image, comma, prediction = line.partition(",")
        if not comma or not prediction.strip() or image in labels:
            reason = "names an image a second time" if image in labels else "is no IMAGE,WNID ..."
            raise UserError(f"line {number} of {str(path)!a}, {line[:80]!a}, {reason}; download it again")
        labels[image] = prediction.split()[0]
    check_classes(labels.values(), classes, ascii(str(path)))
    return labels


def _scan_val(folder: str, labels: dict[str, str]) -> Iterator[Entry | Rejected]:
    left = set(labels)
    for file in visible(folder):
        if not is_image_name(file.name):
            continue
        stem = os.path.splitext(file.name)[0]
        if stem in labels:
            left.discard(stem)
            yield entry_of(file, "val", labels[stem], folder)
        else:
            yield Rejected("val", ascii(file.path), f"{LABELS} has no row for it")
    if left:
        raise UserError(
            f"{folder!a} lacks {len(left)} of the {len(labels)} images of {LABELS} ({some(left)}); "
            "the download or extraction is incomplete: finish it"
        )
