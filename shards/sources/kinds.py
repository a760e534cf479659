"""The kinds of sources by name, with the class lists that ImageNet's own archives must have."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shards.classes import load_classes
from shards.sources.base import Source
from shards.sources.folders import ClassFolders
from shards.sources.ilsvrc import IlsvrcVal
from shards.sources.imagenet21k import Resized21k, Winter21
from shards.sources.kaggle import Kaggle
from shards.sources.names import Named
from shards.sources.parquet import Parquet
from shards.sources.tars import TarOfImages
from shards.sources.webdataset import RULE_OF_LISTED, WebDatasetTars

_Classes = tuple[str, ...] | None
_IMAGENET_21K_P = "21k-p"


@dataclass(frozen=True)
class Asked:
    """What a source is made from: its absolute path, the class list's name or file, the name of its one split where it
    has but one, and the devkit of ilsvrc-val."""

    path: str
    classes: str | None
    split: str = ""
    devkit: str = ""


@dataclass(frozen=True)
class Kind:
    """`help` describes the source, `path` what its path leads to. `classes`: the list that it must have, unless another
    is asked for; `if_named`: only where its file, or one in it, is named so. `one_split`: it has no split names."""

    help: str
    path: str
    make: Callable[[Asked, _Classes], Source]
    classes: str | None = None
    if_named: tuple[str, ...] = ()
    one_split: bool = False

    def class_list(self, asked: Asked) -> str | None:
        """The class list that was asked for, or that the source must have."""
        if asked.classes or not self.if_named:
            return asked.classes or self.classes
        path = Path(asked.path)
        named = any(path.match(pattern) or any(path.rglob(pattern)) for pattern in self.if_named)
        return self.classes if named else None


KINDS = {
    "folder": Kind(
        help="class folders: SOURCE/<class>/<image>",
        path="directory with one folder a class",
        make=lambda asked, classes: ClassFolders(asked.path, asked.split, classes),
        one_split=True,
    ),
    "tar": Kind(
        help="tars of class tars or of class folders, gzipped or not, such as ILSVRC2012_img_train.tar",
        path="tar whose members are <class>.tar or .../<class>/<image>",
        make=lambda asked, classes: TarOfImages(asked.path, asked.split, classes),
        classes="1k",
        if_named=("ILSVRC2012_img_train.tar",),
        one_split=True,
    ),
    "ilsvrc-val": Kind(
        help="ILSVRC2012_img_val.tar with the labels of its devkit",
        path="ILSVRC2012_img_val.tar",
        make=lambda asked, classes: IlsvrcVal(asked.path, asked.devkit, classes or ()),
        classes="1k",
    ),
    "kaggle": Kind(
        help="the layout of Kaggle's ImageNet: ILSVRC/Data/CLS-LOC/{train,val}",
        path="directory that holds ILSVRC/ and LOC_val_solution.csv",
        make=lambda asked, classes: Kaggle(asked.path, classes or ()),
        classes="1k",
    ),
    "parquet": Kind(
        help="Hugging Face parquet files with the columns image and label",
        path="directory of <split>-00000-of-00010.parquet",
        make=lambda asked, classes: Parquet(asked.path, classes),
        classes="1k",
        if_named=("train-*-of-00294.parquet", "validation-*-of-00014.parquet"),
    ),
    "winter21": Kind(
        help="winter21_whole.tar.gz, cut to train and val by the rule of ImageNet-21k-P",
        path="winter21_whole.tar.gz",
        make=lambda asked, classes: Winter21(asked.path, classes),
        classes=_IMAGENET_21K_P,
    ),
    "resized21k": Kind(
        help="imagenet21k_resized.tar.gz, or its folders",
        path="imagenet21k_resized.tar.gz, or the directory that it was extracted to",
        make=lambda asked, classes: Resized21k(asked.path, classes),
        classes=_IMAGENET_21K_P,
    ),
    "webdataset": Kind(
        help="WebDataset tars, to be sharded anew or filtered: --classes 21k-p cuts ImageNet-21k-P out of imagenet_w21",
        path="directory of tars",
        make=lambda asked, classes: WebDatasetTars(
            asked.path, classes, p_rule=RULE_OF_LISTED if asked.classes == _IMAGENET_21K_P else None
        ),
    ),
}


def open_source(kind: str, asked: Asked, out: Path) -> Source:
    """The source of that kind. The pass over the names of a gzip archive is kept in OUT."""
    name = KINDS[kind].class_list(asked)
    source = KINDS[kind].make(asked, load_classes(name) if name else None)
    if isinstance(source, TarOfImages | Winter21 | Resized21k) and source.in_order:
        return Named(source, str(out / f"{Path(asked.path).name}.names.tsv.gz"))
    return source
