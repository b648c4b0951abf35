"""Preparation of a corpus: a text source becomes a tokenizer and token shards in a cached folder.

The folder is named by a fingerprint of the text, its split and its tokenizer, so the same config finds it again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer
from tqdm import tqdm

from raymoe.config import Config, DataSection, expand
from raymoe.data.corpus import CORPUS, TOKENIZER, Corpus, Text, is_complete
from raymoe.data.document import CHAT_TEMPLATE_FILE, Document
from raymoe.data.rows import template_text
from raymoe.data.sources import digest, documents, in_short, skipped
from raymoe.data.tokens import END_OF_TEXT, encode_counted, load_tokenizer, train_tokenizer, vocabulary_size

FORMAT = 3
"""Version of the folder's content. Raise it when the content changes."""

PACKING = (
    "documents of a domain joined by <|endoftext|>, windows of context+1 tokens overlapping by one; "
    "attention crosses documents, never domains"
)
TOKENIZER_SAMPLE = 20_000_000
"""Approximate number of characters of training text that the tokenizer is trained on."""


def prepare(config: Config, progress: bool = True) -> Path:
    """Return the corpus folder of a config, after preparing it if it is not in the cache.

    progress: print the skipped files of a folder, and the time left while the corpus is prepared.
    Raises ValueError or FileNotFoundError, with the remedy, if the text cannot be used.
    """
    data = config.data
    cache = expand(data.cache or Path(config.run.root) / "cache").resolve()  # workers have other folders
    own_tokenizer = given_tokenizer(data)
    fingerprint = _fingerprint(config, own_tokenizer)
    if progress and (left_out := skipped(data)):
        print(f"data.path={data.path}: {len(left_out)} files are not read: {in_short(left_out)}", file=sys.stderr)
    folder = cache / fingerprint
    if not is_complete(folder):
        if folder.exists():
            print(f"{folder} is damaged: preparing it again", file=sys.stderr)
            shutil.rmtree(folder)
        _prepare(config, folder, own_tokenizer, progress)
    _check_size(config, Corpus.open(folder))
    return folder


def given_tokenizer(data: DataSection) -> bytes:
    """Return the content of `data.tokenizer`; empty if none is given."""
    if not data.tokenizer:
        return b""
    file = expand(data.tokenizer)
    content = file.read_bytes() if file.is_file() else b""
    if not content:
        raise FileNotFoundError(f"data.tokenizer={data.tokenizer}: no such file; leave it empty to train a tokenizer")
    return content


def _fingerprint(config: Config, own_tokenizer: bytes) -> str:
    data = config.data
    parts = [
        str(FORMAT), digest(data), data.text_field, data.domain_field, str(data.validation_share),
        hashlib.sha256(own_tokenizer).hexdigest(), str(config.model.vocabulary), str(config.run.seed),
    ]  # fmt: skip
    if data.tune_share:  # 0 keeps the fingerprints of earlier versions
        parts.append(f"tune_share={data.tune_share}")
    if data.format == "chat":  # other fingerprints are those of version 0.1
        parts += ["chat", template_text(data)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _prepare(config: Config, folder: Path, own_tokenizer: bytes, progress: bool) -> None:
    """Write a corpus beside `folder` and rename it. A process that finished first wins; both corpora are equal."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".preparing-", dir=folder.parent))
    partial.chmod(0o755)  # others may read a shared cache
    started = time.monotonic()
    try:
        if progress:
            print(f"preparing the corpus of data.path={config.data.path} in {folder}", file=sys.stderr, flush=True)
        _write(config, partial, folder.name, own_tokenizer, progress)
        try:
            partial.rename(folder)
        except OSError:
            if not is_complete(folder):
                raise
        if progress:
            print(f"prepared the corpus in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_size(config: Config, corpus: Corpus) -> None:
    """Raise ValueError if a split has no window of `model.context` tokens."""
    context = config.model.context
    share = "data.tune_share" if config.data.tune_share else "data.validation_share"
    for split in ("train", "validation"):
        tokens = sum(len(corpus.stream(split, d)) for d in corpus.domains)
        if not (corpus.windows if split == "train" else corpus.validation_windows)(context):
            raise ValueError(
                f"data.path={config.data.path}: {tokens} {split} tokens make no window of model.context={context}: "
                f"give more text, a smaller model.context or another {share}"
            )


def _write(config: Config, folder: Path, fingerprint: str, own_tokenizer: bytes, progress: bool) -> None:
    data, vocabulary = config.data, config.model.vocabulary
    splits = _split(data, documents(data), config.run.seed)
    if own_tokenizer:
        tokenizer = load_tokenizer(own_tokenizer, data.tokenizer, vocabulary)
    else:
        tokenizer = train_tokenizer(_sample(splits["train"], config.run.seed), vocabulary)
    if data.tune_share:  # after the tokenizer, so that runs with and without it have the same one
        splits = _tuning_split(splits["train"], data.tune_share)
    tokenizer.save(str(folder / TOKENIZER))
    domains = sorted({d.domain for d in splits["train"]})
    about: dict[str, Any] = {
        "format": FORMAT, "fingerprint": fingerprint, "source": data.path, "packing": PACKING, "domains": domains,
        "vocabulary": vocabulary_size(tokenizer), "end_of_text": tokenizer.token_to_id(END_OF_TEXT), "splits": {},
    }  # fmt: skip
    if data.format == "chat":
        (folder / CHAT_TEMPLATE_FILE).write_text(template_text(data), encoding="utf-8")
    kind = np.uint16 if vocabulary <= 2**16 else np.uint32
    total = sum(len(d.text) for part in splits.values() for d in part)
    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log gets few lines
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="tokenizing", disable=not progress, delay=3, mininterval=interval
    ) as bar:
        for split, part in splits.items():
            texts = _by_domain(part)
            about["splits"][split] = {
                domain: _write_shard(
                    folder / f"{split}-{i:03d}.arrow", tokenizer, texts[domain], kind, bar, data.format == "chat"
                )
                for i, domain in enumerate(domains)
            }
    about["files"] = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    (folder / CORPUS).write_text(json.dumps(about, indent=1))


def _write_shard(
    file: Path, tokenizer: Tokenizer, texts: list[Document], kind: type, bar: Any, chat: bool
) -> dict[str, Any]:
    """Write the tokens of one domain and, for conversations, which of them count. Returns its entry in corpus.json."""
    tokens, counted = encode_counted(tokenizer, texts, kind, bar.update)
    with pa.OSFile(str(file), "wb") as sink:
        table = pa.table({"tokens": pa.array(tokens)} | ({"counted": pa.array(counted)} if chat else {}))
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    entry = {"file": file.name, "tokens": len(tokens), "bytes": _size(texts)}
    return entry | ({"counted": int(counted.sum())} if chat else {})


def _size(texts: Iterable[Document]) -> int:
    """Return the UTF-8 bytes of these documents that count."""
    return sum(document.bytes for document in texts)


def _by_domain(texts: Iterable[Document]) -> defaultdict[str, list[Document]]:
    found: defaultdict[str, list[Document]] = defaultdict(list)
    for document in texts:
        found[document.domain].append(document)
    return found


def _sample(texts: list[Document], seed: int) -> Iterator[str]:
    """Yield about TOKENIZER_SAMPLE characters at most, from everywhere in `texts`."""
    share = TOKENIZER_SAMPLE / sum(len(d.text) for d in texts)
    chosen = np.random.default_rng(seed).random(len(texts)) < share
    return (document.text for document, wanted in zip(texts, chosen, strict=True) if wanted)


# Holding out


def _split(data: DataSection, found: Iterable[Document], seed: int) -> dict[str, list[Document]]:
    """Return training and validation documents.

    Keeps the splits that the source names; without a validation split, holds out a share of each domain.
    """
    named: dict[str, list[Document]] = {"train": [], "validation": []}
    free: dict[str, list[Document]] = defaultdict(list)
    for document in found:
        if document.split is None:
            free[document.domain].append(document)
        elif document.split in named:
            named[document.split].append(document)
    if not named["validation"]:
        for document in named["train"]:
            free[document.domain].append(document)
        named["train"] = []
    for domain, texts in sorted(free.items()):
        train, held = _hold_out(texts, data.validation_share, f"{seed}/{domain}", whole=data.format == "chat")
        named["train"] += train
        named["validation"] += held
    known = {d.domain for d in named["train"]}
    stray = sorted({d.domain for d in named["validation"]} - known)
    if stray or not known:
        raise ValueError(f"data.path={data.path}: no training text for {', '.join(stray) or 'any domain'}")
    return named


def _hold_out(
    texts: list[Document], share: float, salt: str, *, whole: bool = False
) -> tuple[list[Document], list[Document]]:
    """Split documents into kept and held-out ones of about `share` of the characters.

    Documents are taken in an order that depends on `salt` alone, as long as that brings the held-out size nearer to
    the share. If more than half of it is missing then, the tail of the longest remaining document is cut off, unless
    documents must stay whole.
    """
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(f"{salt}/{i}".encode()).digest())
    target = missing = share * sum(len(d.text) for d in texts)
    held: set[int] = set()
    for i in order:
        if len(texts[i].text) < 2 * missing:
            held.add(i)
            missing -= len(texts[i].text)
    short = 2 * missing > target and not whole
    cut = max(set(order) - held, key=lambda i: (len(texts[i].text), i)) if short else None
    kept, out = [], []
    for i, document in enumerate(texts):
        if i == cut or (i + 1 < len(texts) and (i in held) != (i + 1 in held)):
            document = document._replace(last=True)  # the next piece of the file is in the other split
        if i == cut:
            at = _border(document.text, round(missing))
            kept.append(document._replace(text=document.text[:at]))
            out.append(document._replace(text=document.text[at:]))
        else:
            (out if i in held else kept).append(document)
    return kept, out


def _tuning_split(train: list[Document], share: float) -> dict[str, list[Document]]:
    """Split training documents: the last `share` of the characters of each domain become the validation documents."""
    splits: dict[str, list[Document]] = {"train": [], "validation": []}
    for _, texts in sorted(_by_domain(train).items()):
        kept, tail = _cut_tail(texts, share)
        splits["train"] += kept
        splits["validation"] += tail
    return splits


def _cut_tail(texts: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Split documents, in their order, into the first ones and about the last `share` of the characters.

    The document at the border is cut; a conversation stays whole, in the first part.
    """
    missing = round(share * sum(len(d.text) for d in texts))
    first = len(texts)
    while first and len(texts[first - 1].text) <= missing:
        first -= 1
        missing -= len(texts[first].text)
    kept, tail = texts[:first], texts[first:]
    if first and missing and not texts[first - 1].pieces:
        document = kept.pop()
        at = _border(document.text, missing)
        kept.append(document._replace(text=document.text[:at]))
        tail.insert(0, document._replace(text=document.text[at:]))
    if kept:
        kept[-1] = kept[-1]._replace(last=True)  # the next piece of the file is in the other split
    return kept, tail


def _border(text: str, tail: int) -> int:
    """Return the start of about the last `tail` characters: after a line if one ends near there, else after a word."""
    at = max(1, len(text) - max(1, tail))
    for end in "\n ":
        found = text.rfind(end, max(0, at - tail), at)
        if found >= 0:
            return found + 1
    return at


# Text to evaluate


def read_text(data: DataSection, tokenizer: Tokenizer) -> dict[str, Text]:
    """Return all text of a source by domain, for evaluation; nothing is held out.

    Of a source with splits, returns the test split, or else the validation split.
    """
    found = list(documents(data, test=True))
    for split in ("test", "validation"):
        if any(d.split == split for d in found):
            found = [d for d in found if d.split == split]
            break
    read: dict[str, Text] = {}
    for domain, texts in sorted(_by_domain(found).items()):
        tokens, counted = encode_counted(tokenizer, texts)
        if data.format == "chat":
            read[domain] = Text(tokens, _size(texts), counted)
        else:
            read[domain] = Text(tokens[: -1 if texts[-1].last else None], _size(texts))
    return read
