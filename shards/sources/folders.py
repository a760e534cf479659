"""Class folders, the layout of torchvision's ImageFolder: PATH/<class>/<image>."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from shards.classes import check_classes, some
from shards.errors import UserError
from shards.sources.base import WHOLE_FILE, Entry, Rejected, is_image_name
from shards.sources.fetch import WholeFiles


@dataclass(frozen=True)
class ClassFolders:
    """The folders of `path` are the classes of `split`; all of `classes` and no others, where that is given.

    Names that begin with a dot and files that are no images by their suffix are passed over.
    """

    path: str
    split: str
    classes: tuple[str, ...] | None = None

    in_order = False
    p_rule = None

    def scan(self) -> Iterator[Entry | Rejected]:
        """UserError for a missing directory, no or wrong class folders, one without images or with folders inside."""
        root = os.path.abspath(self.path)
        if not os.path.isdir(root):
            raise UserError(f"the source directory {root!a} does not exist; give one that holds one folder a class")
        names = sorted(entry.name for entry in visible(root) if os.path.isdir(entry.path))
        if not names:
            raise UserError(f"{root!a} holds no class folders; the layout is PATH/<class>/<image>.jpg")
        if self.classes is not None:
            check_classes(names, self.classes, ascii(root))
        for name in names:
            yield from self._scan_class(os.path.join(root, name), name)

    def _scan_class(self, folder: str, class_name: str) -> Iterator[Entry | Rejected]:
        folders, num_images = [], 0
        for file in visible(folder):
            if is_image_name(file.name):
                num_images += 1
                yield entry_of(file, self.split, class_name, folder)
            elif os.path.isdir(file.path):
                folders.append(file.name)
        if folders:
            raise UserError(
                f"class folder {folder!a} holds folders ({some(folders)}), but images lie directly in their class "
                f"folder; if {min(folders)!a} is a class, give {folder!a} as the source, else move its images up"
            )
        if not num_images:
            raise UserError(f"class folder {folder!a} has no images (.jpg, .png, ...); add some or remove the folder")

    def fetcher(self) -> WholeFiles:
        return WholeFiles()


def visible(directory: str) -> Iterator[os.DirEntry[str]]:
    """What a directory holds, in any order, but names that begin with a dot; UserError where it cannot be listed."""
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    yield entry
    except OSError as error:
        raise UserError(f"cannot list {directory!a}: {error.strerror}; check its permissions") from error


def entry_of(file: os.DirEntry[str], split: str, class_name: str, directory: str) -> Entry | Rejected:
    """The image file, or why it cannot be one: links are followed, and only regular files are opened later."""
    try:
        status = file.stat()
    except OSError as error:
        reason = f"a broken link ({error.strerror})" if file.is_symlink() else f"cannot be read: {error.strerror}"
        return Rejected(split, ascii(file.path), reason)
    if stat.S_ISREG(status.st_mode):
        return Entry(split, class_name, file.name, directory, WHOLE_FILE, status.st_size)
    reason = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file but a device, a pipe or a socket"
    return Rejected(split, ascii(file.path), reason)
