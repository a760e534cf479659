"""One run of one loader, in a process of its own: tools/bench_input.py starts it, and reads the JSON line it prints.

The loaders of other projects, and decoding alone, are functions of this file. It needs torch, torchvision, Pillow and
the loader's own package, and nothing of ours: some run in an environment of their own. All crop, flip, augment and
collate by torchvision and torch, and shuffle. webdataset and timm shuffle samples in a buffer of BUFFER, which is full
before the first comes out: while a buffer fills, more is read than delivered.
"""

import argparse
import io
import json
import os
import pkgutil
import random
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

BATCH, WORKERS, SIDE = 64, 2, 224
WARM_UP = 12  # batches: imports, the start of workers, and caches are over by then
BUFFER = 1000
MDS_BYTES = 1 << 26  # of an MDS file and of a LitData chunk
PACKAGES = ("torch", "torchvision", "pillow", "numpy")

Batches = Generator[Sequence[Any], None, None]  # of BATCH images each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("function", help="module:function of a loader or, without --images, of a writer")
    parser.add_argument("source", type=Path, help="what the loader or the writer reads")
    parser.add_argument("out", type=Path, nargs="?", help="where the writer writes")
    parser.add_argument("--images", type=int, help="to be timed")
    parser.add_argument("--randaugment", action="store_true")
    parser.add_argument("--package", action="append", default=[], help="whose version is told")
    options = parser.parse_args()
    function = pkgutil.resolve_name(options.function)
    if options.images is None:
        function(options.source, options.out)
        return
    with closing(function(options.source, options.randaugment)) as batches:
        measured = measure(batches, options.images)
    versions = {name: version(name) for name in (*PACKAGES, *options.package)}
    print(json.dumps({**measured, "versions": versions}))


def measure(batches: Batches, num_images: int) -> dict[str, Any]:
    """Seconds of wall time, and of CPU time of all processes, that `num_images` or a few more take once all runs."""
    for _ in range(WARM_UP):
        batch = next(batches)
    cpu, wall, images = cpu_seconds(), time.perf_counter(), 0
    while images < num_images:
        images += len(next(batches))
    seconds = time.perf_counter() - wall
    shape = [*getattr(batch, "shape", ())]
    return {"images": images, "cpu": cpu_seconds() - cpu, "wall": seconds, "shape": shape}


def cpu_seconds() -> float:
    """User and system time of this process and its descendants, and of those of theirs that were waited for."""
    ticks, children = dict[int, int](), dict[int, list[int]]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()  # from the third on: proc(5)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        process = int(path.parent.name)
        children.setdefault(int(fields[1]), []).append(process)
        ticks[process] = sum(map(int, fields[11:15]))
    family = [os.getpid()]
    for process in family:
        family += children.get(process, [])
    return sum(ticks[process] for process in family) / os.sysconf("SC_CLK_TCK")


class Transform:
    """An image of Pillow, or the bytes of a file -> uint8 tensor [3, SIDE, SIDE]."""

    def __init__(self, randaugment: bool) -> None:
        from torchvision import transforms

        augment = [transforms.RandAugment(2, 15)] * randaugment
        crop, flip = transforms.RandomResizedCrop(SIDE), transforms.RandomHorizontalFlip()
        self.compose = transforms.Compose([crop, flip, *augment, transforms.PILToTensor()])

    def __call__(self, image: Any) -> Any:
        from PIL import Image

        return self.compose(Image.open(io.BytesIO(image)).convert("RGB") if isinstance(image, bytes) else image)


def epochs(loader: Iterable[Any]) -> Batches:
    """Images of one epoch after another."""
    while True:
        for images, _labels in loader:
            yield images


def in_torch_loader(dataset: Any, shuffle: bool | None = None) -> Batches:
    from torch.utils.data import DataLoader

    return epochs(DataLoader(dataset, BATCH, shuffle, num_workers=WORKERS, drop_last=True))


def decode_only(folder: Path, randaugment: bool) -> Batches:
    """Whole images by one process, of files in memory."""
    import simplejpeg

    inodes = {path.stat().st_ino: path for path in folder.rglob("*.JPEG")}
    files = [path.read_bytes() for path in inodes.values()]
    random.Random(0).shuffle(files)
    decode: Callable[[bytes], Any] = simplejpeg.decode_jpeg
    while True:
        for start in range(0, len(files), BATCH):
            yield [decode(data) for data in files[start : start + BATCH]]


def image_folder(folder: Path, randaugment: bool) -> Batches:
    from torchvision.datasets import ImageFolder

    return in_torch_loader(ImageFolder(folder, Transform(randaugment)), shuffle=True)


def webdataset(folder: Path, randaugment: bool) -> Batches:
    from webdataset import WebDataset

    urls = [str(path) for path in sorted(folder.glob("train-*.tar"))]
    samples = WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(BUFFER, initial=BUFFER)
    return in_torch_loader(samples.to_tuple("jpg", "cls").map_tuple(Transform(randaugment), int))


def timm(folder: Path, randaugment: bool) -> Batches:
    from timm.data import create_dataset

    buffer: Any = {"sample_shuffle_size": BUFFER, "sample_initial_size": BUFFER}
    dataset = create_dataset("wds/", str(folder), "train", is_training=True, batch_size=BATCH, **buffer)
    dataset.transform = Transform(randaugment)
    dataset.set_loader_cfg(num_workers=WORKERS)
    return in_torch_loader(dataset)


def streaming(folder: Path, randaugment: bool) -> Batches:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    transform = Transform(randaugment)

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> tuple[Any, int]:
            sample = super().__getitem__(at)
            return transform(sample["image"]), sample["label"]

    clean_stale_shared_memory()  # of a run that was killed: else this one is refused
    return in_torch_loader(Images(local=str(folder), shuffle=True, batch_size=BATCH))


def litdata(folder: Path, randaugment: bool) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset

    transform = Transform(randaugment)

    def transformed(sample: dict[str, Any]) -> tuple[Any, int]:
        return transform(sample["image"]), sample["label"]

    dataset = StreamingDataset(str(folder), shuffle=True, drop_last=True, transform=transformed)
    return epochs(StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS))


def spdl(folder: Path, randaugment: bool) -> Batches:
    from spdl.dataloader import get_pytorch_dataloader
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(folder, Transform(randaugment))
    return epochs(get_pytorch_dataloader(dataset, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True))


def files_of(folder: Path) -> list[tuple[str, int]]:
    """Paths and labels of class folders, shuffled, as shards are."""
    classes = sorted(folder.iterdir())
    files = [(str(path), label) for label, path in enumerate(classes) for path in sorted(path.iterdir())]
    random.Random(0).shuffle(files)
    return files


def read_sample(file: tuple[str, int]) -> dict[str, Any]:
    return {"image": Path(file[0]).read_bytes(), "label": file[1]}


def write_mds(folder: Path, out: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(out), columns={"image": "bytes", "label": "int"}, size_limit=MDS_BYTES) as writer:
        for file in files_of(folder):
            writer.write(read_sample(file))


def write_litdata(folder: Path, out: Path) -> None:
    from litdata import optimize

    optimize(read_sample, files_of(folder), str(out), chunk_bytes=MDS_BYTES, num_workers=WORKERS)


if __name__ == "__main__":
    main()
