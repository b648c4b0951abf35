"""Text in any form -> packed token batches, a pure function of the step.

`prepare` reads `data.path`, trains or loads the tokenizer and writes token shards once, into a cached
folder; `Corpus` maps them into memory. Packing: a domain's documents are joined by `<|endoftext|>` and cut
into windows of context+1 tokens that overlap by one, so that each token is a target once. Attention
crosses document borders inside a window and never domain borders.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer
from tqdm import tqdm

from raymoe.config import Config, DataSection, expand
from raymoe.data.sources import Document, digest, documents
from raymoe.data.tokens import END_OF_TEXT, encode, load_tokenizer, train_tokenizer, vocabulary_size

FORMAT = 3
"""Raised when what `prepare` writes changes."""

PACKING = (
    "documents of a domain joined by <|endoftext|>, windows of context+1 tokens overlapping by one; "
    "attention crosses documents, never domains"
)
SPLITS = ("train", "validation")
TOKENIZER_SAMPLE = 20_000_000
"""About how many characters of training text the tokenizer is trained on."""


class Batch(NamedTuple):
    tokens: np.ndarray
    """[B, S+1] int64: inputs are all but the last, targets all but the first."""
    domain: np.ndarray
    """[B] int64"""
    mask: np.ndarray
    """[B, S] bool: the targets that count."""


class Text(NamedTuple):
    """A text to evaluate."""

    tokens: np.ndarray
    """[N] unsigned integers."""
    bytes: int
    """UTF-8 bytes of the text; 0 if unknown."""


def prepare(config: Config, progress: bool = True) -> Path:
    """The corpus folder of a config: made once, then found again by its fingerprint.

    The fingerprint covers the text itself, how it is read and split, and the tokenizer.
    Raises ValueError or FileNotFoundError with the remedy when the text cannot be used.
    """
    data, model = config.data, config.model
    cache = expand(data.cache or Path(config.run.root) / "cache").resolve()  # workers have other folders
    given = expand(data.tokenizer)
    own = given.read_bytes() if data.tokenizer and given.is_file() else b""
    if data.tokenizer and not own:
        raise FileNotFoundError(f"data.tokenizer={data.tokenizer}: there is no such file; leave it empty to train one")
    parts = [
        str(FORMAT), digest(data), data.text_field, data.domain_field, str(data.validation_share),
        hashlib.sha256(own).hexdigest(), str(model.vocabulary), str(config.run.seed),
    ]  # fmt: skip
    fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    folder = cache / fingerprint
    if not _complete(folder):
        if folder.exists():
            print(f"{folder} is damaged: preparing it again", file=sys.stderr)
            shutil.rmtree(folder)
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".preparing-", dir=cache))
        partial.chmod(0o755)  # a shared cache is for all who see it
        try:
            _write(config, partial, fingerprint, own, progress)
            try:
                partial.rename(folder)
            except OSError:
                if not _complete(folder):  # another process was faster: its corpus is the same
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    corpus = Corpus.open(folder)
    for split in ("train", "validation"):
        tokens = sum(len(corpus.stream(split, d)) for d in corpus.domains)
        if not (corpus.windows if split == "train" else corpus.validation_windows)(model.context):
            raise ValueError(
                f"data.path={data.path}: {tokens} {split} tokens make no window of model.context={model.context}: "
                "give more text, a smaller model.context or another data.validation_share"
            )
    return folder


def _complete(folder: Path) -> bool:
    try:
        about = json.loads((folder / "corpus.json").read_text())
        named = {about["splits"][split][domain]["file"] for split in SPLITS for domain in about["domains"]}
        if not named <= about["files"].keys() or any(Path(name).name != name for name in about["files"]):
            return False  # a file of another folder is none of a corpus
        return all((folder / name).stat().st_size == size for name, size in about["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _write(config: Config, folder: Path, fingerprint: str, own_tokenizer: bytes, progress: bool) -> None:
    data, vocabulary = config.data, config.model.vocabulary
    splits = _split(data, documents(data), config.run.seed)
    if own_tokenizer:
        tokenizer = load_tokenizer(own_tokenizer, data.tokenizer, vocabulary)
    else:
        tokenizer = train_tokenizer(_sample(splits["train"], config.run.seed), vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    domains = sorted({d.domain for d in splits["train"]})
    kind = np.uint16 if vocabulary <= 2**16 else np.uint32
    about: dict[str, Any] = {
        "format": FORMAT, "fingerprint": fingerprint, "source": data.path, "packing": PACKING, "domains": domains,
        "vocabulary": vocabulary_size(tokenizer), "end_of_text": tokenizer.token_to_id(END_OF_TEXT), "splits": {},
    }  # fmt: skip
    total = sum(len(d.text) for part in splits.values() for d in part)
    seldom = 0.1 if sys.stderr.isatty() else 10.0  # lines of a job's log
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="tokenising", disable=not progress, delay=3, mininterval=seldom
    ) as bar:
        for split, part in splits.items():
            about["splits"][split] = {}
            texts = _by_domain(part)
            for i, domain in enumerate(domains):
                chosen = texts[domain]
                tokens = encode(tokenizer, chosen, kind, bar.update)
                file = f"{split}-{i:03d}.arrow"
                with pa.OSFile(str(folder / file), "wb") as sink:
                    table = pa.table({"tokens": pa.array(tokens)})
                    with pa.ipc.new_file(sink, table.schema) as writer:
                        writer.write_table(table)
                about["splits"][split][domain] = {
                    "file": file,
                    "tokens": len(tokens),
                    "bytes": _size(chosen),
                }
    about["files"] = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    (folder / "corpus.json").write_text(json.dumps(about, indent=1))


def _size(documents: Iterable[Document]) -> int:
    """Return the UTF-8 bytes of these documents."""
    return sum(len(document.text.encode()) for document in documents)


def _by_domain(texts: Iterable[Document]) -> defaultdict[str, list[Document]]:
    found: defaultdict[str, list[Document]] = defaultdict(list)
    for document in texts:
        found[document.domain].append(document)
    return found


def _split(data: DataSection, found: Iterable[Document], seed: int) -> dict[str, list[Document]]:
    """Training and validation documents. Splits that the source names are kept; else a share of each domain is held out."""
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
        train, held = _hold_out(texts, data.validation_share, f"{seed}/{domain}")
        named["train"] += train
        named["validation"] += held
    known = {d.domain for d in named["train"]}
    stray = sorted({d.domain for d in named["validation"]} - known)
    if stray or not known:
        raise ValueError(f"data.path={data.path}: no training text for {', '.join(stray) or 'any domain'}")
    return named


def _hold_out(texts: list[Document], share: float, salt: str) -> tuple[list[Document], list[Document]]:
    """Documents in an order that depends on salt alone, held out while that brings their size nearer to the share.

    Where most of it is still missing then, the longest of the others gives its tail.
    """
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(f"{salt}/{i}".encode()).digest())
    target = missing = share * sum(len(d.text) for d in texts)
    held: set[int] = set()
    for i in order:
        if len(texts[i].text) < 2 * missing:
            held.add(i)
            missing -= len(texts[i].text)
    cut = max(set(order) - held, key=lambda i: (len(texts[i].text), i)) if 2 * missing > target else None
    kept, out = [], []
    for i, document in enumerate(texts):
        if i == cut or (i + 1 < len(texts) and (i in held) != (i + 1 in held)):
            document = document._replace(last=True)  # what followed it in the file does not follow it here
        if i == cut:
            at = _border(document.text, round(missing))
            kept.append(document._replace(text=document.text[:at]))
            out.append(document._replace(text=document.text[at:]))
        else:
            (out if i in held else kept).append(document)
    return kept, out


def _border(text: str, tail: int) -> int:
    """Where about the last `tail` characters begin: after a line if one ends near there, else after a word."""
    at = max(1, len(text) - max(1, tail))
    for end in "\n ":
        found = text.rfind(end, max(0, at - tail), at)
        if found >= 0:
            return found + 1
    return at


def _sample(texts: list[Document], seed: int) -> Iterator[str]:
    """At most about TOKENIZER_SAMPLE characters, from everywhere in `texts`."""
    share = TOKENIZER_SAMPLE / sum(len(d.text) for d in texts)
    chosen = np.random.default_rng(seed).random(len(texts)) < share
    return (document.text for document, wanted in zip(texts, chosen, strict=True) if wanted)


def read_text(data: DataSection, tokenizer: Tokenizer) -> dict[str, Text]:
    """All of a source by domain, nothing held out: for evaluation. Of a source with splits, the test split, else validation."""
    found = list(documents(data, test=True))
    for split in ("test", "validation"):
        if any(d.split == split for d in found):
            found = [d for d in found if d.split == split]
            break
    return {
        domain: Text(encode(tokenizer, texts)[: -1 if texts[-1].last else None], _size(texts))
        for domain, texts in sorted(_by_domain(found).items())
    }


# Reading back


class Corpus:
    """Token shards in memory maps: opening costs nothing, and processes share the pages."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder = folder
        self.about = about
        self.domains: tuple[str, ...] = tuple(about["domains"])
        self.vocabulary: int = about["vocabulary"]
        self.end_of_text: int = about["end_of_text"]
        self.fingerprint: str = about["fingerprint"]
        self._streams: dict[tuple[str, str], np.ndarray] = {}

    @classmethod
    def open(cls, folder: Path | str) -> Corpus:
        """Raises ValueError if the folder is not a whole corpus."""
        folder = Path(folder)
        if not _complete(folder):
            raise ValueError(f"{folder} is not a complete corpus: delete it and start the run again to rebuild it")
        about = json.loads((folder / "corpus.json").read_text())
        if {type(about.get(name)) for name in ("vocabulary", "end_of_text")} != {int} or "fingerprint" not in about:
            raise ValueError(f"{folder} is not a corpus: its corpus.json does not describe one")
        return cls(folder, about)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        file = self.folder / "tokenizer.json"
        return load_tokenizer(file.read_bytes(), str(file), self.vocabulary)

    def stream(self, split: str, domain: str) -> np.ndarray:
        """All tokens of a domain, memory-mapped."""
        key = (split, domain)
        if key not in self._streams:
            file = self.folder / self.about["splits"][split][domain]["file"]
            try:
                column = pa.ipc.open_file(pa.memory_map(str(file))).read_all().column("tokens")
                column.validate()  # the bytes of a damaged one may be anywhere
                if column.type not in (pa.uint16(), pa.uint32()) or column.num_chunks > 1:
                    raise ValueError(f"tokens of type {column.type} in {column.num_chunks} pieces")
            except (pa.ArrowException, OSError, KeyError, ValueError) as error:
                raise ValueError(
                    f"{file} is damaged ({error}): delete {self.folder} to have it prepared again"
                ) from None
            self._streams[key] = column.chunk(0).to_numpy() if column.num_chunks else np.zeros(0, np.uint16)
        return self._streams[key]

    def bytes(self, split: str, domain: str) -> int:
        """UTF-8 bytes of a domain's text."""
        return self.about["splits"][split][domain]["bytes"]

    def validation_text(self) -> dict[str, Text]:
        """The held-out part of each domain that has one."""
        texts = {d: Text(self.stream("validation", d), self.bytes("validation", d)) for d in self.domains}
        return {domain: text for domain, text in texts.items() if len(text.tokens)}

    # Training windows: whole ones only.

    @lru_cache(maxsize=4)  # noqa: B019 - a process opens one corpus and reads it with one context
    def _bounds(self, context: int) -> np.ndarray:
        """[domains+1]: the first window of each domain, and their total."""
        counts = [max(0, (len(self.stream("train", d)) - 1) // context) for d in self.domains]
        return np.concatenate(([0], np.cumsum(counts)))

    def windows(self, context: int) -> int:
        """Training windows in an epoch."""
        return int(self._bounds(context)[-1])

    @lru_cache(maxsize=2)  # noqa: B019 - a step touches two epochs at most
    def _order(self, seed: int, epoch: int, windows: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(windows)

    def batch(self, *, seed: int, step: int, global_batch: int, context: int, rows: range) -> Batch:
        """Sequences `rows` of step `step`: a function of the arguments alone, whoever asks.

        Each epoch visits all windows once, in an order of its own.
        """
        bounds, total = self._bounds(context), self.windows(context)
        tokens = np.empty((len(rows), context + 1), dtype=np.int64)
        domain = np.empty(len(rows), dtype=np.int64)
        for i, row in enumerate(rows):
            epoch, at = divmod(step * global_batch + row, total)
            window = self._order(seed, epoch, total)[at]
            domain[i] = np.searchsorted(bounds, window, side="right") - 1
            start = (window - bounds[domain[i]]) * context
            tokens[i] = self.stream("train", self.domains[domain[i]])[start : start + context + 1]
        return Batch(tokens, domain, np.ones((len(rows), context), dtype=bool))

    # Validation windows: the last partial one of each domain counts, padded and masked.

    @lru_cache(maxsize=4)  # noqa: B019
    def _validation(self, context: int, limit: int | None) -> tuple[tuple[int, int], ...]:
        """(domain, start) of each window; with a limit, an even selection over all of them."""
        found = [
            (i, start)
            for i, d in enumerate(self.domains)
            for start in range(0, len(self.stream("validation", d)) - 1, context)
        ]
        if limit is None or limit >= len(found):
            return tuple(found)
        return tuple(found[i * len(found) // limit] for i in range(limit))

    def validation_windows(self, context: int, limit: int | None = None) -> int:
        return len(self._validation(context, limit))

    def validation(self, *, context: int, limit: int | None = None, rows: range | None = None) -> Batch:
        """Validation windows `rows` (all by default) of the first `limit` evenly spread ones."""
        chosen = self._validation(context, limit)
        chosen = chosen if rows is None else chosen[rows.start : rows.stop]
        tokens = np.full((len(chosen), context + 1), self.end_of_text, dtype=np.int64)
        mask = np.zeros((len(chosen), context), dtype=bool)
        for i, (domain, start) in enumerate(chosen):
            part = self.stream("validation", self.domains[domain])[start : start + context + 1]
            tokens[i, : len(part)] = part
            mask[i, : len(part) - 1] = True
        return Batch(tokens, np.array([d for d, _ in chosen], dtype=np.int64), mask)
