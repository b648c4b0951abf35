"""Where text comes from: the built-in corpus, local files (text, jsonl, parquet, arrow), the hub. Errors name the remedy."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from raymoe.config import DataSection, expand
from raymoe.data import builtin

PIECE = 16384
"""Characters of a text file that make one document, so that it is tokenised in parallel and held out in parts."""

BLOCK = 2**20
"""Characters of a text file that are read at a time."""

HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:.+)?")
HUB_NAMES = {
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
}
TEXT = (".txt", ".md", ".tokens", ".raw", "")
SUFFIXES = (".jsonl", ".parquet", ".arrow", *TEXT)
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
        root = expand(data.path)
        found = (document for file in files for document in _read_file(file, data, root))
    else:
        found = _hub(data)
    empty = True
    for document in found:
        if document.text and (test or document.split != "test"):
            empty = False
            yield document
    if empty:
        raise ValueError(
            f"data.path={data.path} has no text outside a test split: give a file, folder or data set with some"
        )


def digest(data: DataSection) -> str:
    """What `documents` would read, in a few characters: the bytes of local files, the name of hub data."""
    if data.path == "builtin":
        return builtin.fingerprint()
    if not _local(data.path):
        return f"hub {data.path}"
    total = hashlib.sha256()
    root = expand(data.path)
    for file in _files(data.path):
        with file.open("rb") as content:
            total.update(f"{file.relative_to(root) if root.is_dir() else file.name}\n".encode())
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def _local(path: str) -> bool:
    """Whether data.path names something here: it exists, or looks like a path rather than a hub name."""
    return (
        expand(path).exists()
        or not HUB_NAME.fullmatch(path)
        or path.lower().endswith(tuple(suffix for suffix in SUFFIXES if suffix))
    )


def check_source(data: DataSection) -> None:
    """Raise FileNotFoundError or ValueError if `data` names a local file that does not exist. Reads no text."""
    if data.path != "builtin" and _local(data.path):
        _files(data.path)
    if data.tokenizer and not expand(data.tokenizer).is_file():
        raise FileNotFoundError(f"data.tokenizer={data.tokenizer}: no such file; leave it empty to train a tokenizer")


def _files(path: str) -> list[Path]:
    root = expand(path)
    if not root.exists():
        raise FileNotFoundError(
            f"data.path={path}: there is no such file or folder here ({root.resolve()}); a job reads the files of the "
            "machine it runs on: give an absolute path that every node sees, a hub name, or builtin"
        )
    if root.is_file():
        if root.suffix.lower() not in SUFFIXES:
            raise ValueError(f"data.path={path}: {root.suffix} files are not supported: txt, jsonl, parquet or arrow")
        return [root]
    files = sorted(
        p
        for p in root.rglob("*")
        if p.suffix.lower() in SUFFIXES
        and p.is_file()
        and not any(part.startswith((".", "_")) for part in p.relative_to(root).parts)  # .git, _SUCCESS
    )
    if not files:
        raise ValueError(f"data.path={path}: the folder holds no txt, jsonl, parquet or arrow file")
    return files


def _labels(file: Path, root: Path) -> tuple[str, str | None]:
    """Domain and split from the names of a folder's files: the first folder below the root, else the stem without its split.

    A file given by itself is whole, whatever its name.
    """
    words = re.sub(r"-\d+-of-\d+$", "", file.stem).split(".")  # the hub's `train-00000-of-00004.parquet`
    folders = file.relative_to(root).parts[:-1] if root.is_dir() else ()
    splits = [SPLITS[name] for name in (*reversed(folders), *words) if name in SPLITS]
    domain = next((f for f in folders if f not in SPLITS), "") or ".".join(w for w in words if w not in SPLITS)
    return domain or "text", splits[0] if splits and root.is_dir() else None


def _read_file(file: Path, data: DataSection, root: Path) -> Iterator[Document]:
    domain, split = _labels(file, root)
    kind = file.suffix.lower()
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty: remove it or give it text")
    try:
        if kind in TEXT:
            with file.open(encoding="utf-8-sig", newline="\n") as content:
                yield from _pieces(iter(lambda: content.read(BLOCK), ""), domain, split)
        else:
            for place, row in _jsonl(file, data) if kind == ".jsonl" else _table(file, kind, data):
                yield _document(row, data, domain, split, place)
    except UnicodeDecodeError:
        raise ValueError(
            f"{file} is not UTF-8 at byte {_first_bad_byte(file)}: convert it, "
            f"for example: iconv -f latin1 -t utf-8 {file.name}"
        ) from None


def _first_bad_byte(file: Path) -> int:
    try:
        return len(file.read_bytes().decode())
    except UnicodeDecodeError as error:
        return error.start


def _pieces(blocks: Iterable[str], domain: str, split: str | None) -> Iterator[Document]:
    """One text, cut at line ends or, in longer lines, anywhere."""
    rest = ""
    for block in blocks:
        text, start = rest + block, 0
        while len(text) - start > PIECE:
            stop = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
            yield Document(domain, split, text[start:stop], last=False)
            start = stop
        rest = text[start:]
    if rest:
        yield Document(domain, split, rest)


def _jsonl(file: Path, data: DataSection) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="\n") as lines:  # a text may hold other line ends, like U+2028
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{file}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                said = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(f"{place} is not JSON ({said}): one object a line is expected") from None
            if not isinstance(row, dict):
                raise ValueError(f"{place} is not a JSON object: one object a line is expected")
            _columns(row, data, place)
            yield place, row


def _table(file: Path, kind: str, data: DataSection) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of the columns that count. Those of a damaged file may point anywhere: they are checked before they are read."""
    batches: Any
    try:
        if kind == ".parquet":
            table = pq.ParquetFile(file)
            columns = _columns(table.schema_arrow.names, data, str(file))
            batches = table.iter_batches(columns=columns)
        else:
            source = pa.memory_map(str(file))
            try:
                reader = pa.ipc.open_file(source)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            except pa.ArrowInvalid:  # `datasets` saves the streaming form
                source.seek(0)
                batches = reader = pa.ipc.open_stream(source)
            columns = _columns(reader.schema.names, data, str(file))
        for batch in batches:
            batch = batch.select(columns)
            batch.validate(full=True)
            yield from ((str(file), row) for row in batch.to_pylist())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a readable {kind[1:]} file: {error}") from None


def _columns(present: Iterable[str], data: DataSection, place: str) -> list[str]:
    """The columns to read. Raises ValueError if one is missing."""
    wanted = {"data.text_field": data.text_field, "data.domain_field": data.domain_field}
    for option, column in wanted.items():
        if column and column not in present:
            raise ValueError(f"{place} has no {column!r}: set {option} to one of {', '.join(map(repr, present))}")
    return list(dict.fromkeys(column for column in wanted.values() if column))


def _document(row: dict[str, Any], data: DataSection, domain: str, split: str | None, place: str) -> Document:
    """A row as a document, empty where its text is null."""
    text = row[data.text_field]
    if not isinstance(text, str | None):
        raise ValueError(f"{place}: {data.text_field!r} is {type(text).__name__}, not text: set data.text_field")
    text = text or ""
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
            f"({type(said).__name__}: {' '.join(str(said).split())}). Check the name (owner/name or owner/name:subset) "
            "and the network (HF_ENDPOINT, HTTPS_PROXY), give a local file or folder, or use builtin"
        ) from None
    finally:
        config.HF_HUB_OFFLINE = offline
    domain = name.rsplit("/", 1)[-1]
    for key, rows in loaded.items():
        split, place = SPLITS.get(str(key)), f"{data.path} {key}"
        columns = _columns(rows.column_names, data, place)
        batches: Any = rows.select_columns(columns).iter(1000)
        if name.endswith("/wikitext"):  # its rows are the lines of one text, blank ones without their end
            lines = ("".join(line or " \n" for line in batch[data.text_field]) for batch in batches)
            yield from _pieces(lines, domain, split)
            continue
        for batch in batches:
            for values in zip(*(batch[column] for column in columns), strict=True):
                yield _document(dict(zip(columns, values, strict=True)), data, domain, split, place)
