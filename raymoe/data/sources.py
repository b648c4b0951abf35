"""Sources of text: the built-in corpus, local files and data sets of the Hugging Face hub.

`documents` reads a source; `digest` identifies its content; `skipped` lists the files of a folder that are not read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raymoe.config import DataSection, expand
from raymoe.data import builtin
from raymoe.data.document import Document
from raymoe.data.rows import RowReader, column, columns
from raymoe.data.text_files import GZIP, decoding_errors, inner_name, open_text

PIECE = 16384
"""Maximum characters of a document that is cut from a text file. Pieces are tokenized in parallel and held out singly."""

BLOCK = 2**20
"""Characters of a text file that are read at a time."""

FIRST_LINE = 16 << 20
"""Maximum bytes of the first line of a .json file that is tested for being JSON lines."""

HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:.+)?")
HUB_NAMES = {
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
}
TEXT = (".txt", ".md", ".tokens", ".raw", "")
JSON_LINES = (".jsonl", ".json")
TABLES = (".parquet", ".arrow")
OTHER = (".csv", ".tsv", ".zip", ".html", ".xml", ".pdf")
"""Suffixes that are not read but mark data.path as a local path rather than a hub name."""
FORMATS = "txt, md, jsonl, json (one object per line), their .gz, parquet and arrow"
ABOUT_THE_DATA = re.compile(r"(readme|licen[sc]e|notice|copying|changelog|authors)(\.(md|txt|rst))?", re.IGNORECASE)
"""Names of files in a folder that describe the data and are not part of it."""
NO_CONVERSATIONS = "plain text has no conversations (data.format=chat)"
LISTED = 8
"""Maximum number of skipped files that a message names."""
SPLITS = {
    "train": "train",
    "training": "train",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}


def documents(data: DataSection, *, test: bool = False) -> Iterator[Document]:
    """Yield all documents of `data.path`, without its test split unless `test` is set.

    Raises ValueError or FileNotFoundError, with the remedy, if the source is missing, damaged or without text.
    """
    rows = RowReader(data)
    if data.path == "builtin":
        found: Iterator[Document] = (Document(domain, None, text) for domain, text in builtin.documents())
    elif _local(data.path):
        files, _ = _files(data)
        root = expand(data.path)
        found = (document for file in files for document in _read_file(file, rows, root))
    else:
        found = _hub(rows)
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
    """Return a short text that identifies what `documents` reads: the bytes of local files, or the hub's name."""
    if data.path == "builtin":
        return builtin.fingerprint()
    if not _local(data.path):
        return f"hub {data.path}"
    total = hashlib.sha256()
    root = expand(data.path)
    for file in _files(data)[0]:
        with file.open("rb") as content:
            total.update(f"{file.relative_to(root) if root.is_dir() else file.name}\n".encode())
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def check_source(data: DataSection) -> None:
    """Raise FileNotFoundError or ValueError if `data` names local files that are missing or unsupported.

    Reads no more than the first line of .json files, and the chat template.
    """
    RowReader(data)
    if data.path != "builtin" and _local(data.path):
        _files(data)
    if data.tokenizer and not expand(data.tokenizer).is_file():
        raise FileNotFoundError(f"data.tokenizer={data.tokenizer}: no such file; leave it empty to train a tokenizer")


def skipped(data: DataSection) -> list[str]:
    """Return the files of the folder `data.path` that `documents` does not read, each with the reason."""
    return [] if data.path == "builtin" or not _local(data.path) else _files(data)[1]


def in_short(reasons: list[str]) -> str:
    """Return at most LISTED of these reasons as one line."""
    more = len(reasons) - LISTED
    return ", ".join(reasons[:LISTED]) + (f" and {more} more" if more > 0 else "")


# Local files


def _local(path: str) -> bool:
    """Return whether data.path exists here, or looks like a path rather than a hub name."""
    suffixes = tuple(suffix for suffix in (*TEXT, *JSON_LINES, *TABLES, *OTHER, GZIP) if suffix)
    return expand(path).exists() or not HUB_NAME.fullmatch(path) or path.lower().endswith(suffixes)


def _kind(file: Path) -> str | None:
    """Return the suffix of a supported format, without .gz; None for any other file."""
    suffix = Path(inner_name(file)).suffix.lower()
    compressed = file.suffix.lower() == GZIP
    return suffix if suffix in (*TEXT, *JSON_LINES) or (suffix in TABLES and not compressed) else None


def _files(data: DataSection) -> tuple[list[Path], list[str]]:
    """Return the files to read, and the skipped ones with reasons. Hidden files and `_SUCCESS` marks are in neither."""
    root = expand(data.path)
    if not root.exists():
        raise FileNotFoundError(
            f"data.path={data.path}: there is no such file or folder here ({root.resolve()}); a job reads the files of "
            "the machine it runs on: give an absolute path that every node sees, a hub name, or builtin"
        )
    if root.is_file():
        if _kind(root) is None:
            raise ValueError(
                f"data.path={data.path}: {root.suffix} files are not supported: convert it to one of {FORMATS}"
            )
        if data.format == "chat" and _kind(root) in TEXT:
            raise ValueError(f"data.path={data.path}: {NO_CONVERSATIONS}: give jsonl, parquet or arrow with messages")
        return [root], []
    files: list[Path] = []
    passed: list[str] = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if any(part.startswith((".", "_")) for part in name.parts) or not path.is_file():
            continue
        if reason := _reason_to_skip(path, data):
            passed.append(f"{name} ({reason})")
        else:
            files.append(path)
    if not files:
        found = f"skipped: {in_short(passed)}" if passed else "it is empty"
        raise ValueError(f"data.path={data.path}: the folder has no file in a supported format ({FORMATS}); {found}")
    return files, passed


def _reason_to_skip(file: Path, data: DataSection) -> str:
    """Return why a file of a folder is not read; empty if it is read."""
    kind = _kind(file)
    if kind is None:
        return "unsupported format"
    if kind in TEXT and ABOUT_THE_DATA.fullmatch(inner_name(file)):
        return "describes the data"
    if kind in TEXT and data.format == "chat":
        return NO_CONVERSATIONS
    if kind == ".json" and not _is_json_lines(file, data):
        return f"not one JSON object per line with {column(data)!r}"
    return ""


def _is_json_lines(file: Path, data: DataSection) -> bool:
    try:
        with open_text(file) as lines:
            row = json.loads(lines.readline(FIRST_LINE))
    except (ValueError, RecursionError, OSError, EOFError):
        return False
    return isinstance(row, dict) and column(data) in row


def _labels(file: Path, root: Path) -> tuple[str, str | None]:
    """Return the domain and split of a file from its path.

    The domain is the first folder below the root, else the stem without its split. A file given by itself has no split.
    """
    words = re.sub(r"-\d+-of-\d+$", "", Path(inner_name(file)).stem).split(".")  # `train-00000-of-00004.parquet`
    folders = file.relative_to(root).parts[:-1] if root.is_dir() else ()
    splits = [SPLITS[name] for name in (*reversed(folders), *words) if name in SPLITS]
    domain = next((f for f in folders if f not in SPLITS), "") or ".".join(w for w in words if w not in SPLITS)
    return domain or "text", splits[0] if splits and root.is_dir() else None


def _read_file(file: Path, rows: RowReader, root: Path) -> Iterator[Document]:
    data = rows.data
    domain, split = _labels(file, root)
    kind = _kind(file)
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty: remove it or give it text")
    if kind in TABLES:
        for place, row in _table(file, kind, data):
            yield rows.document(row, domain, split, place)
        return
    with decoding_errors(file):
        if kind in TEXT:
            with open_text(file) as content:
                yield from _pieces(iter(lambda: content.read(BLOCK), ""), domain, split)
        else:
            for place, row in _json_lines(file, data):
                yield rows.document(row, domain, split, place)


def _pieces(blocks: Iterable[str], domain: str, split: str | None) -> Iterator[Document]:
    """Cut one text at line ends or, in lines longer than PIECE, anywhere."""
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


def _json_lines(file: Path, data: DataSection) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, object) of each line. Only \\n ends a line: a text may contain U+2028 and others."""
    with open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{file}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(
                    f"{place} is not JSON ({reason}): write one object per line, for example with jq -c '.[]'"
                ) from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{place} is not a JSON object: write one object per line, for example with jq -c '.[]'"
                )
            columns(row, data, place)
            yield place, row


def _table(file: Path, kind: str, data: DataSection) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) with the columns that are read. Each batch is validated first: offsets of a damaged file may
    point anywhere.
    """
    batches: Any
    try:
        if kind == ".parquet":
            table = pq.ParquetFile(file)
            names = columns(table.schema_arrow.names, data, str(file))
            batches = table.iter_batches(columns=names)
        else:
            source = pa.memory_map(str(file))
            try:
                reader = pa.ipc.open_file(source)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            except pa.ArrowInvalid:  # `datasets` saves the streaming format
                source.seek(0)
                batches = reader = pa.ipc.open_stream(source)
            names = columns(reader.schema.names, data, str(file))
        for batch in batches:
            batch = batch.select(names)
            batch.validate(full=True)
            yield from ((str(file), row) for row in batch.to_pylist())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a readable {kind[1:]} file: {error}") from None


# The hub


def _hub(rows: RowReader) -> Iterator[Document]:
    """Yield the documents of a hub data set with its own splits. Reads the local cache if the hub is unreachable."""
    data = rows.data
    name, _, subset = data.path.partition(":")
    name, subset = HUB_NAMES.get(name, (name, subset))
    domain = name.rsplit("/", 1)[-1]
    try:
        sets = load_from_hub(name, subset)
    except ValueError as error:
        raise ValueError(
            f"data.path={data.path}: neither a local file nor an available data set of the hub ({error}). Check the name "
            "(owner/name or owner/name:subset) and the network (HF_ENDPOINT, HTTPS_PROXY), give a local file or folder, "
            "or use builtin"
        ) from None
    for key, table in sets.items():
        split, place = SPLITS.get(str(key)), f"{data.path} {key}"
        names = columns(table.column_names, data, place)
        batches: Any = table.select_columns(names).iter(1000)
        if name.endswith("/wikitext"):  # its rows are the lines of one text; blank lines lack their line end
            lines = ("".join(line or " \n" for line in batch[data.text_field]) for batch in batches)
            yield from _pieces(lines, domain, split)
            continue
        for batch in batches:
            for values in zip(*(batch[name] for name in names), strict=True):
                yield rows.document(dict(zip(names, values, strict=True)), domain, split, place)


def load_from_hub(name: str, subset: str) -> Any:
    """Return the splits of a hub data set by name, from the local cache if the hub is unreachable.

    Raises ValueError with the cause, without a remedy.
    """
    import datasets
    import huggingface_hub
    from datasets import config

    offline, reason = config.HF_HUB_OFFLINE, None
    try:
        # load_dataset alone retries six times, half a minute or more, before it reads its own cache.
        huggingface_hub.dataset_info(name, timeout=10)
    except Exception as error:
        config.HF_HUB_OFFLINE, reason = True, error
    try:
        return datasets.load_dataset(name, subset or None)
    except Exception as error:  # datasets raises many types
        cause = reason or error
        raise ValueError(f"{type(cause).__name__}: {' '.join(str(cause).split())}") from None
    finally:
        config.HF_HUB_OFFLINE = offline
