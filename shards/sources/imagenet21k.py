"""ImageNet-21k of winter 2021, raw and as the authors of ImageNet-21k-P (Ridnik et al., 2021) distribute it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from shards.classes import some
from shards.errors import UserError
from shards.sources.base import Entry, Fetcher, PRule, Rejected
from shards.sources.fetch import WholeFiles
from shards.sources.folders import ClassFolders, visible
from shards.sources.tars import TarImage, TarOfImages, images

_SPLITS = {"imagenet21k_train": "train", "imagenet21k_val": "val"}
_MAX_OTHERS = 100


@dataclass(frozen=True)
class Winter21:
    """winter21_whole.tar.gz, a tar of <wnid>.tar, or the same unpacked: all of it is "train", to be cut by `p_rule`.

    Only names that end in ".JPEG", in capitals, count.
    """

    path: str
    classes: tuple[str, ...] | None = None
    p_rule: PRule = field(default_factory=PRule)

    @property
    def in_order(self) -> bool:
        return self._tar.in_order

    @property
    def _tar(self) -> TarOfImages:
        return TarOfImages(self.path, "train")

    def scan(self) -> Iterator[Entry | Rejected]:
        """UserError for a missing or damaged archive; memory does not grow with it."""
        for finding in self._tar.scan():
            if isinstance(finding, Rejected) or finding.name.endswith(".JPEG"):
                yield finding

    def fetcher(self) -> Fetcher:
        return self._tar.fetcher()


@dataclass(frozen=True)
class Resized21k:
    """imagenet21k_resized.tar.gz, the same unpacked, or a directory with its folders: images of 10,450 classes.

    imagenet21k_train/<wnid>/ becomes "train" and imagenet21k_val/<wnid>/ "val", at the top or one folder below it. All
    else is passed over, such as imagenet21k_small_classes/.
    """

    path: str
    classes: tuple[str, ...] | None = None

    p_rule = None

    @property
    def in_order(self) -> bool:
        return not os.path.isdir(self.path) and TarOfImages(self.path, "").in_order

    def scan(self) -> Iterator[Entry | Rejected]:
        """UserError for a missing or damaged archive, and for one that has neither of the folders."""
        return self._scan_directory() if os.path.isdir(self.path) else self._scan_tar()

    def fetcher(self) -> Fetcher:
        return WholeFiles() if os.path.isdir(self.path) else TarOfImages(self.path, "").fetcher()

    def _scan_directory(self) -> Iterator[Entry | Rejected]:
        root = os.path.abspath(self.path)
        tops = sorted(entry.name for entry in visible(root) if entry.is_dir())
        found = [
            (os.path.join(root, top, name), split)
            for top in ("", *tops)
            for name, split in _SPLITS.items()
            if os.path.isdir(os.path.join(root, top, name))
        ]
        if not found:
            raise self._nothing(tops)
        for folder, split in found:
            yield from ClassFolders(folder, split).scan()

    def _scan_tar(self) -> Iterator[Entry | Rejected]:
        found, others = False, set[str]()
        for image in images(self.path):
            if split := next((_SPLITS[name] for name in image.parts[:-1][:2] if name in _SPLITS), ""):
                found = True
                yield _in_class_folder(image).finding(self.path, split)
            elif len(others) < _MAX_OTHERS:
                others.add("".join(image.parts[:1]))
        if not found:
            raise self._nothing(sorted(others))

    def _nothing(self, tops: list[str]) -> UserError:
        return UserError(
            f"{self.path!a} has neither of the folders {' and '.join(_SPLITS)}, but {some(tops) or 'nothing'}; "
            "give imagenet21k_resized.tar.gz, or the directory that it was unpacked in"
        )


def _in_class_folder(image: TarImage) -> TarImage:
    """The image; with a reason against it unless it lies in <split>/<class>/."""
    above = image.parts[:-1]
    fits = len(above) > 1 and above[-2] in _SPLITS
    return image if fits or image.reason else image._replace(reason="it does not lie in a class folder")
