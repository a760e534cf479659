"""Stub of the lead until the helper's module is there."""
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol
from shards.errors import UserError
from shards.files import OpenFiles
from shards.index import Index
class StoreError(UserError): ...
class Store(Protocol):
    fetches_ahead: bool
    def read(self, name: str, offset: int, size: int) -> bytes: ...
    def where(self, name: str) -> str: ...
    def ahead(self, names: Iterable[str]) -> None: ...
    def close(self) -> None: ...
class LocalStore:
    fetches_ahead = False
    def __init__(self, root: Path) -> None:
        self._root = root; self._files = OpenFiles()
    def __reduce__(self): return LocalStore, (self._root,)
    def read(self, name, offset, size): return self._files.read(self._root / name, offset, size)
    def where(self, name): return str(self._root / name)
    def ahead(self, names): pass
    def close(self): self._files.close()
@dataclass(frozen=True)
class StoreOptions:
    remote: Literal["cache", "range"] = "cache"
    cache: str = "~/.cache/vittm-pipeline"
    cache_size: str = "100GB"
def open_data(location: str, options: StoreOptions = StoreOptions()):
    index = Index.load(location)
    return index, LocalStore(index.root)
