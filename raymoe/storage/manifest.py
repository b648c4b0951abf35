"""A folder of safetensors files with a `manifest.json` that lists every file and tensor.

    {"format_version": 1,
     "files":   {name: {"bytes": ..., "sha256": ...}},
     "tensors": {key: {"file": name, "dtype": "F32", "shape": [...]}}, ...}

The folder is untrusted input. `Manifest.open` checks the manifest against the names, sizes and headers of the files.
`Verify` selects when checksums are verified.
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
from typing import Any, Literal, NamedTuple, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from raymoe.storage.files import CorruptFile, durable_write, read_json

MANIFEST = "manifest.json"
T = TypeVar("T")

Verify = Literal["all", "on_read", "none"]
"""When checksums are verified: all at open; each before its file is first read; never (another process did)."""


class StoredTensor(NamedTuple):
    """File, safetensors dtype name (`F32`, `F16`, `U8`) and shape of a stored tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]


# Writing


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file durably. Returns its manifest entry."""
    with durable_write(path) as partial:
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, partial)
        return describe_file(partial)


def describe_file(path: Path) -> dict[str, Any]:
    """Return the manifest entry of a file: its size in bytes and its SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return key -> (dtype, shape) of a safetensors file without reading its tensors."""
    with safe_open(path, "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: (s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}


# Reading


@dataclass(frozen=True)
class Manifest:
    """A manifest that agrees with the sizes and headers of its files."""

    folder: Path
    content: dict[str, Any]
    """The whole JSON object."""
    error: type[CorruptFile]
    """Exception type for every violation."""
    when: Verify
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    _verified: set[str] = field(default_factory=set)
    """Files whose checksum was verified through this object."""

    @classmethod
    def open(cls, folder: Path, *, version: int, error: type[CorruptFile], verify: Verify) -> Manifest:
        """Check the manifest in `folder` against its files: names, sizes, tensors, dtypes and shapes.

        Raises `error` for the first violation.
        """
        path = _regular(folder, MANIFEST, error)
        self = cls(folder, read_json(path, error), error, verify)
        found = self.get("format_version", int)
        if found != version:
            raise error(path, f"has format_version {found}, which is not supported: this release reads {version}")
        for name, entry in self.get("files", dict).items():
            self._check_size(name, entry)
            if verify == "all":
                self.verify(name)
        for key, entry in self.get("tensors", dict).items():
            self.tensors[key] = self._tensor_entry(key, entry)
        require_same(self._read_headers(), self.tensors, folder, error)
        return self

    def get(self, name: str, kind: type[T]) -> T:
        """Return the field `name` of the manifest. Raises `error` unless its type is `kind`."""
        return self._typed(self.content.get(name), kind, repr(name))

    def verify(self, name: str) -> None:
        """Verify the checksum of the file `name`, unless it was verified before through this object. Raises `error` if it differs."""
        if name in self._verified:
            return
        path = self.folder / name
        try:
            found = _sha256(path)
        except OSError as cause:
            raise self.error(path, f"cannot be read: {cause.strerror}") from cause
        if found != self.content["files"][name]["sha256"]:
            raise self.error(path, "does not have the sha256 of the manifest: the file is damaged; copy it again")
        self._verified.add(name)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return copies of these tensors. Opens each file once, and verifies its checksum unless `when` is "none".

        Raises ValueError for an unknown key, `error` for a damaged file.
        """
        wanted: defaultdict[str, list[str]] = defaultdict(list)
        for key in keys:
            if key not in self.tensors:
                raise ValueError(f"{self.folder} has no tensor {key!r}: was it written with another configuration?")
            wanted[self.tensors[key].file].append(key)
        tensors: dict[str, Tensor] = {}
        for name, stored in wanted.items():
            if self.when != "none":
                self.verify(name)
            with self._reading(name) as path, safe_open(path, "pt") as file:
                # Cloned, because a tensor is a view of the file, which may be pruned.
                tensors |= {key: file.get_tensor(key).clone() for key in stored}
        return tensors

    def _typed(self, value: Any, kind: type[T], what: str) -> T:
        if type(value) is not kind:
            raise self.error(self.folder / MANIFEST, f"{what} is missing, or not of type {kind.__name__}")
        return value

    def _check_size(self, name: str, entry: Any) -> None:
        fields = self._typed(entry, dict, f"the entry of file {name!r}")
        size = self._typed(fields.get("bytes"), int, f"the bytes of file {name!r}")
        self._typed(fields.get("sha256"), str, f"the sha256 of file {name!r}")
        path = _regular(self.folder, name, self.error)
        try:
            actual = path.stat().st_size
        except OSError as cause:
            raise self.error(path, f"cannot be read: {cause.strerror}") from cause
        if actual != size:
            raise self.error(path, f"has {actual} bytes; the manifest lists {size}")

    def _tensor_entry(self, key: str, entry: Any) -> StoredTensor:
        fields = self._typed(entry, dict, f"the entry of tensor {key!r}")
        file = self._typed(fields.get("file"), str, f"the file of tensor {key!r}")
        dtype = self._typed(fields.get("dtype"), str, f"the dtype of tensor {key!r}")
        shape = self._typed(fields.get("shape"), list, f"the shape of tensor {key!r}")
        if file not in self.content["files"]:
            raise self.error(self.folder / MANIFEST, f"tensor {key!r} is in {file!r}, which is not among the files")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise self.error(self.folder / MANIFEST, f"tensor {key!r} has a shape that is not of integers from 0 up")
        return StoredTensor(file, dtype, tuple(shape))

    def _read_headers(self) -> dict[str, StoredTensor]:
        """Return the tensors that the headers of the files list."""
        found: dict[str, StoredTensor] = {}
        for name in self.content["files"]:
            if name.endswith(".safetensors"):
                with self._reading(name) as path:
                    entries = header(path)
                for key, (dtype, shape) in entries.items():
                    if key in found:
                        raise self.error(path, f"holds {key!r}, and so does {found[key].file}")
                    found[key] = StoredTensor(name, dtype, shape)
        return found

    @contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        path = self.folder / name
        try:
            yield path
        except (OSError, SafetensorError, RuntimeError) as cause:
            if isinstance(cause, RuntimeError) and path.is_file():  # torch raises it for a file that was just removed
                raise
            raise self.error(path, f"cannot be read as safetensors: {cause}") from cause


def require_same(
    found: dict[str, StoredTensor], expected: dict[str, StoredTensor], folder: Path, error: type[CorruptFile]
) -> None:
    """Raise `error` for the first tensor that differs from the expected one."""
    for key, stored in (expected | found).items():
        if found.get(key) != expected.get(key):
            raise error(
                folder / stored.file,
                f"tensor {key!r} is {_in_words(found.get(key))}; expected {_in_words(expected.get(key))}",
            )


def _in_words(stored: StoredTensor | None) -> str:
    return f"{stored.dtype} {list(stored.shape)} in {stored.file}" if stored else "absent"


def _regular(folder: Path, name: str, error: type[CorruptFile]) -> Path:
    """Return the path of a regular file inside `folder`. Raises `error` for names and links that lead out of it."""
    if not all(re.fullmatch(r"\w[\w.-]*", part, re.ASCII) for part in name.split("/")):
        raise error(folder / MANIFEST, f"names the file {name!r}: only plain names inside the folder are allowed")
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise error(path, "is a link that leads out of the folder")
    if not os.path.isfile(path):
        raise error(path, "is missing, or is not a regular file")
    return path
