"""WebDataset tars, ours or others', as a source: to shard them anew, or to cut ImageNet-21k-P out of them."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shards.classes import some
from shards.errors import UserError
from shards.index import MANIFEST, Index
from shards.sources.base import Entry, PRule, Rejected, is_image_name
from shards.sources.fetch import Ranges
from shards.tars.in_place import split_of, tars_in
from shards.tars.samples import TarSample, Unfit, samples_of, shown

# Where a class list selects the classes, and not their size.
RULE_OF_LISTED = PRule(min_images=1)
# ImageNet-21k-P of the Winter 21 release (Ridnik et al., 2021).
_NUM_TRAIN, _NUM_VAL = 11_060_223, 522_500
_PUBLIC = (
    "the public imagenet_w21 tars lack about 2,000 of the 13 million files, those under 32 pixels wide or high; 20 "
    "damaged files are in them re-encoded, and images over 768 pixels on the shorter side resized (their dataset card, "
    "https://huggingface.co/datasets/timm/imagenet-w21-webp-wds)"
)


@dataclass(frozen=True)
class WebDatasetTars:
    """The tars that lie in directory `path`, of the splits that their names tell, or all of `split`.

    A class is what json says (wnid, class_id, synset), else the wnid that begins the key, else the label, by the names
    of the directory's index. A file name is what json says (filename), else the key. With `p_rule`, all is train, and
    images of other classes than `classes` are passed over: `passed_over` counts those of the last scan by class.
    """

    path: str
    classes: tuple[str, ...] | None = None
    split: str = ""
    p_rule: PRule | None = None
    passed_over: Counter[str] = field(default_factory=Counter, compare=False, repr=False)

    in_order = False

    def scan(self) -> Iterator[Entry | Rejected]:
        """Walks headers, labels and jsons, and reads no image. UserError for a directory without tars, a name that
        tells no split, and a tar that cannot be read or is damaged."""
        self.passed_over.clear()
        root = Path(os.path.abspath(self.path))
        tars = tars_in(root)
        labels = Index.load(root).classes if (root / MANIFEST).exists() else ()
        listed = frozenset(self.classes or ()) if self.p_rule else None
        for tar in tars:
            split = "train" if self.p_rule else self.split or split_of(tar.name)
            for finding in _scan_tar(tar, split, labels):
                if listed is None or isinstance(finding, Rejected) or finding.class_name in listed:
                    yield finding
                else:
                    self.passed_over[finding.class_name] += 1

    def fetcher(self) -> Ranges:
        return Ranges()


def explain_21k_p(source: WebDatasetTars, train: Sequence[int], val: Sequence[int], num_left_out: int) -> str:
    """How the images written differ in number from those of ImageNet-21k-P, and what is known of why.

    `train` and `val` are the images of each class of `source`, whose last scan they come from; `num_left_out` are those
    that were scanned and not written.
    """
    classes = source.classes or ()
    num_train, num_val, total = sum(train), sum(val), _NUM_TRAIN + _NUM_VAL
    num_names = {name: a + b for name, a, b in zip(classes, train, val, strict=True)}
    few = [name for name, count in num_names.items() if count < PRule().min_images]
    too_few = [name for name, count in num_names.items() if count <= PRule().num_val]
    num_absent = total - num_train - num_val - num_left_out
    lines = [
        f"{num_train:,} train and {num_val:,} val images; ImageNet-21k-P has {_NUM_TRAIN:,} and {_NUM_VAL:,}: "
        f"{num_train - _NUM_TRAIN:+,} and {num_val - _NUM_VAL:+,}",
        f"{sum(source.passed_over.values()):,} images of {len(source.passed_over):,} other classes are passed over",
        f"{num_left_out:,} images are left out here; the report says which and why",
        f"{num_absent:,} of the {total:,} files of ImageNet-21k-P are not in these tars"
        if num_absent >= 0
        else f"{-num_absent:,} files more than the {total:,} of ImageNet-21k-P are in these tars",
        _PUBLIC,
        "a file that lacks among the first 50 of its class puts the next name into val: where counts agree, images may "
        "still differ",
    ]
    if few:
        lines.append(f"{len(few):,} classes have fewer than the 501 files that the rule asks for: {some(few)}")
    if too_few:
        lines.append(f"{len(too_few):,} classes have 50 files or fewer, all in val and none in train: {some(too_few)}")
    return "\n  ".join(lines)


def _scan_tar(tar: Path, split: str, labels: Sequence[str]) -> Iterator[Entry | Rejected]:
    try:
        with open(tar, "rb", buffering=0) as file:
            for sample in samples_of(file):
                try:
                    yield _entry(sample, str(tar), split, labels)
                except Unfit as error:
                    yield Rejected(split, f"{tar.name}: {shown(sample.key)}", str(error))
    except OSError as error:
        raise UserError(f"cannot read {tar} ({error.strerror}); check its permissions and its disk") from error


def _entry(sample: TarSample, container: str, split: str, labels: Sequence[str]) -> Entry:
    """Unfit for a sample without an image or a class, or with one that cannot be part of a key."""
    name, image = sample.image()
    class_name = sample.class_name() or _class_of_key(sample.key) or _class_of_label(sample, labels)
    file_name = _file_name(sample, name)
    if "/" in class_name or not (class_name + file_name).isprintable():
        raise Unfit(f"its class {shown(class_name)} and name {shown(file_name)} make no key: '/', or not printable")
    return Entry(split, class_name, file_name, container, image.offset, image.size)


def _class_of_key(key: str) -> str:
    match = re.match(r"n\d{8}(?=_)", key.rpartition("/")[2])
    return match[0] if match else ""


def _class_of_label(sample: TarSample, labels: Sequence[str]) -> str:
    label = sample.label()
    if label < len(labels):
        return labels[label]
    raise Unfit(
        f"no class: its label {label} is not among the {len(labels)} of an index"
        if labels
        else f"no class: neither json nor key names one, and no index tells what label {label} is"
    )


def _file_name(sample: TarSample, image_field: str) -> str:
    """The name in json, unless a key could not be made of it."""
    name = sample.meta.get("filename")
    name = name.rpartition("/")[2] if isinstance(name, str) else ""
    if is_image_name(name) and "." not in os.path.splitext(name)[0]:
        return name
    return f"{sample.key.rpartition('/')[2]}.{image_field}"
