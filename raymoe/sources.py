"""Where text comes from: the built-in corpus, local files in five formats, the hub. Errors name the remedy."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from raymoe import builtin
from raymoe.config import DataSection

PIECE = 16384
"""Characters of a text file that make one document, so that it is tokenised in parallel and held out in parts."""

HUB_NAMES = {
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
}
TEXT = (".txt", ".md", ".tokens", "")
TABLES = (".parquet", ".arrow")
SPLITS = {
    "train": "train",
    "training": "train",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}


class Document(NamedTuple):
    domain: str
    split: str | None
    """`train`, `validation` or `test` where the source says so."""
    text: str
    last: bool = True
    """Whether end-of-text follows; not between the pieces of one file."""


def documents(data: DataSection, *, test: bool = False) -> Iterator[Document]:
    """All documents of `data.path`; those of a test split only if asked for."""
    if data.path == "builtin":
        found: Iterator[Document] = (Document(domain, None, text) for domain, text in builtin.documents())
    elif _local(data.path):
        files = _files(data.path)
        found = (document for file in files for document in _read_file(file, data, Path(data.path)))
    else:
        found = _hub(data)
    empty = True
    for document in found:
        if document.text and (test or document.split != "test"):
            empty = False
            yield document
    if empty:
        raise ValueError(f"data.path={data.path} has no text: give a file, folder or data set with some")


def digest(data: DataSection) -> str:
    """What `documents` would read, in a few characters: the bytes of local files, the name of hub data."""
    if data.path == "builtin":
        return builtin.fingerprint()
    if not _local(data.path):
        return f"hub {data.path}"
    total = hashlib.sha256()
    root = Path(data.path).expanduser()
    for file in _files(data.path):
        with file.open("rb") as content:
            total.update(f"{file.relative_to(root) if root.is_dir() else file.name}\n".encode())
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def _local(path: str) -> bool:
    """Whether data.path names something here: it exists, or looks like a path rather than a hub name."""
    return (
        Path(path).expanduser().exists()
        or path.startswith(("/", "~", "."))
        or path.lower().endswith((*TEXT[:3], *TABLES, ".jsonl"))
    )


def _files(path: str) -> list[Path]:
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(
            f"data.path={path}: there is no such file or folder here ({root.resolve()}); a job reads the files of the "
            "machine it runs on: give an absolute path that every node sees, a hub name, or builtin"
        )
    if root.is_file():
        if root.suffix.lower() not in (*TEXT, *TABLES, ".jsonl"):
            raise ValueError(f"data.path={path}: {root.suffix} files are not supported: txt, jsonl, parquet or arrow")
        return [root]
    files = sorted(
        p
        for p in root.rglob("*")
        if p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(root).parts)  # `.git` as well
        and p.suffix.lower() in (*TEXT, *TABLES, ".jsonl")
    )
    if not files:
        raise ValueError(f"data.path={path}: the folder holds no txt, jsonl, parquet or arrow file")
    return files


def _labels(file: Path, root: Path) -> tuple[str, str | None]:
    """Domain and split from a file's name: the first folder below the root, else the stem without its split."""
    words = re.sub(r"-\d+-of-\d+$", "", file.stem).split(".")  # the hub's `train-00000-of-00004.parquet`
    split = next((SPLITS[w] for w in words if w in SPLITS), None)
    stem = ".".join(w for w in words if w not in SPLITS)
    folders = file.relative_to(root).parts[:-1] if root.is_dir() else ()
    for folder in folders:
        split = SPLITS.get(folder, split)
    named = [f for f in folders if f not in SPLITS]
    return (named[0] if named else stem or "text"), split


def _read_file(file: Path, data: DataSection, root: Path) -> Iterator[Document]:
    domain, split = _labels(file, root.expanduser())
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty: remove it or give it text")
    kind = file.suffix.lower()
    if kind in TEXT:
        yield from _pieces(_utf8(file), domain, split)
        return
    rows = _jsonl(file) if kind == ".jsonl" else _table(file)
    for place, row in rows:
        yield _row(row, data, domain, split, f"{file}{place}")


def _utf8(file: Path) -> str:
    raw = file.read_bytes()
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 at byte {error.start}: convert it, for example: iconv -f latin1 -t utf-8 {file.name}"
        ) from None


def _pieces(text: str, domain: str, split: str | None) -> Iterator[Document]:
    start = 0
    while start < len(text):
        stop = len(text) if len(text) - start <= PIECE else text.rfind("\n", start, start + PIECE) + 1
        if stop <= start:  # a line longer than a piece
            stop = min(len(text), start + PIECE)
        yield Document(domain, split, text[start:stop], last=stop == len(text))
        start = stop


def _jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_utf8(file).split("\n"), 1):  # splitlines would also cut at U+2028 inside a text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number} is not JSON ({error.msg}): one object a line is expected") from None
        if not isinstance(row, dict):
            raise ValueError(f"{file}:{number} is not a JSON object: one object a line is expected")
        yield f":{number}", row


def _table(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        if file.suffix.lower() == ".parquet":
            for batch in pq.ParquetFile(file).iter_batches():
                yield from (("", row) for row in batch.to_pylist())
            return
        with pa.memory_map(str(file)) as source:
            try:
                batches: Any = pa.ipc.open_file(source)
                read = (batches.get_batch(i) for i in range(batches.num_record_batches))
            except pa.ArrowInvalid:  # `datasets` saves the streaming form
                source.seek(0)
                read = iter(pa.ipc.open_stream(source))
            for batch in read:
                yield from (("", row) for row in batch.to_pylist())
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} is not a readable {file.suffix[1:].lower()} file: {error}") from None


def _row(row: dict[str, Any], data: DataSection, domain: str, split: str | None, place: str) -> Document:
    for name, field in (("data.text_field", data.text_field), ("data.domain_field", data.domain_field)):
        if field and field not in row:
            raise ValueError(f"{place} has no {field!r}: set {name} to one of {', '.join(map(repr, row))}")
    text = row[data.text_field]
    if not isinstance(text, str):
        raise ValueError(f"{place}: {data.text_field!r} is {type(text).__name__}, not text: set data.text_field")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} has half a surrogate pair at character {error.start}: remove it") from None
    return Document(str(row[data.domain_field]) if data.domain_field else domain, split, text)


def _hub(data: DataSection) -> Iterator[Document]:
    """A data set of the hub, with its own splits. Where the hub does not answer, one that it gave before."""
    import datasets
    import huggingface_hub
    from datasets import config

    name, _, subset = data.path.partition(":")
    name, subset = HUB_NAMES.get(name, (name, subset))
    offline, reason = config.HF_HUB_OFFLINE, None
    try:
        # load_dataset alone tries six times, for half a minute and more, before it turns to its own cache.
        huggingface_hub.dataset_info(name, timeout=10)
    except Exception as error:
        config.HF_HUB_OFFLINE, reason = True, error
    try:
        loaded = datasets.load_dataset(name, subset or None)
    except Exception as error:  # datasets raises many kinds; they say the same to a user
        said = reason or error
        raise ValueError(
            f"data.path={data.path}: neither a local file nor a data set that the hub gave "
            f"({type(said).__name__}: {' '.join(str(said).split())}). Check the name and the network "
            "(HF_ENDPOINT, HTTPS_PROXY), give a local file or folder, or use builtin"
        ) from None
    finally:
        config.HF_HUB_OFFLINE = offline
    lines = name.endswith("/wikitext")  # its rows are the lines of one text, blank ones without their line end
    for split, rows in loaded.items():
        for i, row in enumerate(rows):
            document = _row(
                dict(row), data, name.rsplit("/", 1)[-1], SPLITS.get(str(split)), f"{data.path} {split}[{i}]"
            )
            if lines:
                document = document._replace(text=document.text.removesuffix("\n") + "\n", last=False)
            if document.text:
                yield document
