"""A folder of safetensors files under one `manifest.json`: written whole or not at all, believed only when checked.

    {"format_version": 1,
     "files":   {name: {"bytes": ..., "sha256": ...}},
     "tensors": {key: {"file": name, "dtype": "F32", "shape": [...]}}, ...}

What is read may be hostile: every claim is checked against the files before a tensor is handed out.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from raymoe.storage.files import CorruptFile, durable_write, read_json

MANIFEST = "manifest.json"
T = TypeVar("T")


class StoredTensor(NamedTuple):
    """A tensor as a file holds it; `dtype` as safetensors names it."""

    file: str
    dtype: str
    shape: tuple[int, ...]


# Writing


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file durably; returns what a manifest says about it."""
    with durable_write(path) as partial:
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, partial)
        return describe_file(partial)


def describe_file(path: Path) -> dict[str, Any]:
    """What a manifest says about a file."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key -> (dtype, shape) of a safetensors file, without reading its tensors."""
    with safe_open(path, "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: (s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}


# Reading


@dataclass(frozen=True)
class Manifest:
    """A manifest whose claims hold."""

    folder: Path
    content: dict[str, Any]
    """All of the JSON."""
    error: type[CorruptFile]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, *, version: int, error: type[CorruptFile], verify: bool) -> Manifest:
        """Check the manifest in `folder` against its files: sizes, tensors and, with `verify`, every checksum.

        Raises `error` for the first claim that does not hold.
        """
        path = _regular(folder, MANIFEST, error)
        self = cls(folder, read_json(path, error), error)
        found = self.get("format_version", int)
        if found != version:
            raise error(path, f"has format_version {found}, which is not supported: this release reads {version}")
        try:
            for name, entry in self.get("files", dict).items():
                self._check_file(name, entry, verify)
        except OSError as cause:
            raise error(folder, f"cannot be read: {cause}") from cause
        for key, entry in self.get("tensors", dict).items():
            self.tensors[key] = self._stored(key, entry)
        require_same(self._held(), self.tensors, folder, error)
        return self

    def get(self, name: str, kind: type[T]) -> T:
        """The manifest's field `name`; an error unless it is a `kind`."""
        return self._typed(self.content.get(name), kind, repr(name))

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Copies of these tensors, opening each file once. Raises ValueError for a key that is not there."""
        wanted: defaultdict[str, list[str]] = defaultdict(list)
        for key in keys:
            if key not in self.tensors:
                raise ValueError(f"{self.folder} has no tensor {key!r}: was it written with another configuration?")
            wanted[self.tensors[key].file].append(key)
        tensors: dict[str, Tensor] = {}
        for name, held in wanted.items():
            with self._reading(name) as path, safe_open(path, "pt") as file:
                # Cloned, because a tensor is a view of the file, which may be pruned.
                tensors |= {key: file.get_tensor(key).clone() for key in held}
        return tensors

    def _typed(self, value: Any, kind: type[T], what: str) -> T:
        if type(value) is not kind:
            raise self.error(self.folder / MANIFEST, f"{what} is missing, or not of type {kind.__name__}")
        return value

    def _check_file(self, name: str, entry: Any, verify: bool) -> None:
        claims = self._typed(entry, dict, f"the entry of file {name!r}")
        size = self._typed(claims.get("bytes"), int, f"the bytes of file {name!r}")
        sha256 = self._typed(claims.get("sha256"), str, f"the sha256 of file {name!r}")
        path = _regular(self.folder, name, self.error)
        actual = path.stat().st_size
        if actual != size:
            raise self.error(path, f"has {actual} bytes, the manifest says {size}")
        if verify and _sha256(path) != sha256:
            raise self.error(path, "its sha256 is not the manifest's")

    def _stored(self, key: str, entry: Any) -> StoredTensor:
        claims = self._typed(entry, dict, f"the entry of tensor {key!r}")
        file = self._typed(claims.get("file"), str, f"the file of tensor {key!r}")
        dtype = self._typed(claims.get("dtype"), str, f"the dtype of tensor {key!r}")
        shape = self._typed(claims.get("shape"), list, f"the shape of tensor {key!r}")
        if file not in self.content["files"]:
            raise self.error(self.folder / MANIFEST, f"tensor {key!r} is in {file!r}, which is not among the files")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise self.error(self.folder / MANIFEST, f"tensor {key!r} has a shape that is not of integers from 0 up")
        return StoredTensor(file, dtype, tuple(shape))

    def _held(self) -> dict[str, StoredTensor]:
        """What the files themselves say that they hold."""
        held: dict[str, StoredTensor] = {}
        for name in self.content["files"]:
            if name.endswith(".safetensors"):
                with self._reading(name) as path:
                    found = header(path)
                for key, (dtype, shape) in found.items():
                    if key in held:
                        raise self.error(path, f"holds {key!r}, and so does {held[key].file}")
                    held[key] = StoredTensor(name, dtype, shape)
        return held

    @contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        path = self.folder / name
        try:
            yield path
        except (OSError, SafetensorError, RuntimeError) as cause:
            if isinstance(cause, RuntimeError) and path.is_file():  # torch says so of a file that has just gone
                raise
            raise self.error(path, f"cannot be read as safetensors: {cause}") from cause


def require_same(
    found: dict[str, StoredTensor], expected: dict[str, StoredTensor], folder: Path, error: type[CorruptFile]
) -> None:
    """Raise `error` for the first tensor that is not as expected."""
    for key, stored in (expected | found).items():
        if found.get(key) != expected.get(key):
            raise error(
                folder / stored.file,
                f"tensor {key!r} is {_words(found.get(key))}; expected {_words(expected.get(key))}",
            )


def _words(stored: StoredTensor | None) -> str:
    return f"{stored.dtype} {list(stored.shape)} in {stored.file}" if stored else "absent"


def _regular(folder: Path, name: str, error: type[CorruptFile]) -> Path:
    """The path of a regular file inside `folder`; refuses names and links that lead out of it."""
    if not all(re.fullmatch(r"\w[\w.-]*", part, re.ASCII) for part in name.split("/")):
        raise error(folder / MANIFEST, f"names the file {name!r}: only plain names inside the folder are allowed")
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise error(path, "is a link that leads out of the folder")
    if not os.path.isfile(path):
        raise error(path, "is missing, or is not a regular file")
    return path
