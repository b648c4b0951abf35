"""A prepared corpus: token shards in memory maps, and batches as a pure function of (seed, step).

Packing: the documents of a domain are joined by `<|endoftext|>` and cut into windows of context+1 tokens that
overlap by one, so that each token is a target once. Attention crosses document borders inside a window and never
domain borders. Conversations are packed in the same way; only the tokens of their answers count as targets.
`raymoe.data.prepare` writes the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from raymoe.data.document import CHAT_TEMPLATE_FILE
from raymoe.data.mixture import Mixture
from raymoe.data.tokens import load_tokenizer

CORPUS = "corpus.json"
"""Describes the shards; written last."""
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "validation")


class Batch(NamedTuple):
    """Token windows of one step."""

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
    """UTF-8 bytes of the text that counts; 0 if unknown."""
    counted: np.ndarray | None = None
    """[N]: not 0 for the tokens that count. None: all."""


def is_complete(folder: Path) -> bool:
    """Return whether `folder` has all files of a corpus, with their sizes."""
    try:
        about = json.loads((folder / CORPUS).read_text())
        named = {about["splits"][split][domain]["file"] for split in SPLITS for domain in about["domains"]}
        if not named <= about["files"].keys() or any(Path(name).name != name for name in about["files"]):
            return False  # a corpus has no file in another folder
        return all((folder / name).stat().st_size == size for name, size in about["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


class Corpus:
    """Token shards of a prepared folder, mapped into memory; processes share the pages."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder = folder
        self.about = about
        self.domains: tuple[str, ...] = tuple(about["domains"])
        self.vocabulary: int = about["vocabulary"]
        self.end_of_text: int = about["end_of_text"]
        self.fingerprint: str = about["fingerprint"]
        """Identifies the text, its split and its tokenizer."""
        self._streams: dict[tuple[str, str, str], np.ndarray] = {}

    @classmethod
    def open(cls, folder: Path | str) -> Corpus:
        """Open a prepared folder. Raises ValueError if it is incomplete."""
        folder = Path(folder)
        if not is_complete(folder):
            raise ValueError(f"{folder} is not a complete corpus: delete it and start the run again to rebuild it")
        about = json.loads((folder / CORPUS).read_text())
        if {type(about.get(name)) for name in ("vocabulary", "end_of_text")} != {int} or "fingerprint" not in about:
            raise ValueError(f"{folder} is not a corpus: its corpus.json does not describe one")
        return cls(folder, about)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of `tokenizer.json`."""
        return hashlib.sha256((self.folder / TOKENIZER).read_bytes()).hexdigest()[:16]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        file = self.folder / TOKENIZER
        return load_tokenizer(file.read_bytes(), str(file), self.vocabulary)

    @cached_property
    def chat_template(self) -> str:
        """Template of the conversations; empty for a corpus of plain text."""
        return (self.folder / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8") if self.masked else ""

    @property
    def masked(self) -> bool:
        """Whether only some tokens count as targets: the answers of conversations."""
        return CHAT_TEMPLATE_FILE in self.about["files"]

    def stream(self, split: str, domain: str) -> np.ndarray:
        """Return all tokens of a domain, memory-mapped. Raises ValueError if the shard is damaged."""
        return self._column(split, domain, "tokens")

    def counted(self, split: str, domain: str) -> np.ndarray | None:
        """Return 1 for each token of a domain that counts as a target, memory-mapped uint8; None if all count."""
        return self._column(split, domain, "counted") if self.masked else None

    def _column(self, split: str, domain: str, name: str) -> np.ndarray:
        key = (split, domain, name)
        if key not in self._streams:
            file = self.folder / self.about["splits"][split][domain]["file"]
            types = (pa.uint8(),) if name == "counted" else (pa.uint16(), pa.uint32())
            try:
                column = pa.ipc.open_file(pa.memory_map(str(file))).read_all().column(name)
                column.validate()  # offsets of a damaged shard may point anywhere
                if column.type not in types or column.num_chunks > 1:
                    raise ValueError(f"{name} of type {column.type} in {column.num_chunks} pieces")
            except (pa.ArrowException, OSError, KeyError, ValueError) as error:
                raise ValueError(
                    f"{file} is damaged ({error}): delete {self.folder} and start the run again to rebuild it"
                ) from None
            self._streams[key] = column.chunk(0).to_numpy() if column.num_chunks else np.zeros(0, np.uint16)
        return self._streams[key]

    def bytes(self, split: str, domain: str) -> int:
        """Return the UTF-8 bytes of a domain's text."""
        return self.about["splits"][split][domain]["bytes"]

    def validation_text(self) -> dict[str, Text]:
        """Return the held-out text of each domain that has some."""
        texts = {
            d: Text(self.stream("validation", d), self.bytes("validation", d), self.counted("validation", d))
            for d in self.domains
        }
        return {domain: text for domain, text in texts.items() if len(text.tokens)}

    # Training windows: complete ones only.

    @lru_cache(maxsize=4)  # noqa: B019 - a process opens one corpus
    def _bounds(self, context: int) -> np.ndarray:
        """Return [domains+1]: the first window of each domain, and the total."""
        counts = [max(0, (len(self.stream("train", d)) - 1) // context) for d in self.domains]
        return np.concatenate(([0], np.cumsum(counts)))

    def windows(self, context: int) -> int:
        """Return the number of training windows in an epoch."""
        return int(self._bounds(context)[-1])

    @lru_cache(maxsize=2)  # noqa: B019 - a step touches two epochs at most
    def _order(self, seed: int, epoch: int, windows: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(windows)

    def mixture(self, weights: Mapping[str, float], *, seed: int, context: int) -> Mixture:
        """Return the order of windows with these shares of domains. Raises ValueError if the text does not allow it."""
        return self._mixture(tuple(weights.items()), seed, context)

    @lru_cache(maxsize=2)  # noqa: B019 - a run has one mixture
    def _mixture(self, weights: tuple[tuple[str, float], ...], seed: int, context: int) -> Mixture:
        windows = np.diff(self._bounds(context)).tolist()
        return Mixture(dict(weights), dict(zip(self.domains, windows, strict=True)), seed)

    def batch(
        self, *, seed: int, step: int, global_batch: int, context: int, rows: range,
        mixture: Mapping[str, float] | None = None,
    ) -> Batch:  # fmt: skip
        """Return the sequences `rows` of a step: a pure function of the arguments, equal on every rank.

        Each epoch visits all windows once, in its own order. mixture: weights of the domains (`Mixture`) instead.
        """
        bounds, total = self._bounds(context), self.windows(context)
        order = self.mixture(mixture, seed=seed, context=context) if mixture else None
        tokens = np.empty((len(rows), context + 1), dtype=np.int64)
        domain = np.empty(len(rows), dtype=np.int64)
        mask = np.ones((len(rows), context), dtype=bool)
        for i, row in enumerate(rows):
            position = step * global_batch + row
            if order:
                domain[i], window = order.at(position)
                start = window * context
            else:
                epoch, at = divmod(position, total)
                window = self._order(seed, epoch, total)[at]
                domain[i] = np.searchsorted(bounds, window, side="right") - 1
                start = (window - bounds[domain[i]]) * context
            name = self.domains[domain[i]]
            tokens[i] = self.stream("train", name)[start : start + context + 1]
            if (counted := self.counted("train", name)) is not None:
                mask[i] = counted[start + 1 : start + context + 1]
        return Batch(tokens, domain, mask)

    # Validation windows, including the last partial one of each domain, padded and masked.

    @lru_cache(maxsize=4)  # noqa: B019
    def _validation(self, context: int, limit: int | None) -> tuple[tuple[int, int], ...]:
        """Return (domain, start) of each window; with a limit, an even selection of them."""
        found = [
            (i, start)
            for i, d in enumerate(self.domains)
            for start in range(0, len(self.stream("validation", d)) - 1, context)
        ]
        if limit is None or limit >= len(found):
            return tuple(found)
        return tuple(found[i * len(found) // limit] for i in range(limit))

    def validation_windows(self, context: int, limit: int | None = None) -> int:
        """Return the number of validation windows, at most `limit`."""
        return len(self._validation(context, limit))

    def validation(self, *, context: int, limit: int | None = None, rows: range | None = None) -> Batch:
        """Return validation windows `rows` (default: all) of `limit` evenly spread ones."""
        chosen = self._validation(context, limit)
        chosen = chosen if rows is None else chosen[rows.start : rows.stop]
        tokens = np.full((len(chosen), context + 1), self.end_of_text, dtype=np.int64)
        mask = np.zeros((len(chosen), context), dtype=bool)
        for i, (domain, start) in enumerate(chosen):
            name = self.domains[domain]
            part = self.stream("validation", name)[start : start + context + 1]
            tokens[i, : len(part)] = part
            counted = self.counted("validation", name)
            mask[i, : len(part) - 1] = True if counted is None else counted[start + 1 : start + len(part)]
        return Batch(tokens, np.array([d for d, _ in chosen], dtype=np.int64), mask)
