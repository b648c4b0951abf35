"""A small artifact with a real tokenizer, and an engine that answers in this process, for tests of serving."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Hashable
from pathlib import Path

import torch
from tokenizers import Tokenizer

from raymoe.config import ModelSection
from raymoe.data.tokens import train_tokenizer
from raymoe.model.transformer import Transformer
from raymoe.serving.engine.cluster import LocalClusters
from raymoe.serving.engine.engine import Engine, EngineSettings
from raymoe.serving.engine.request import Increment, Request
from raymoe.serving.engine.trunk import Trunk
from raymoe.storage.artifact import Artifact
from raymoe.storage.artifact_writing import write_artifact

TEXT = "The cat sat on the mat; the dog, naïve as ever, ran after 42 birds. Ünïcode: 日本語, 🙂 and 🚀! "
MODEL = ModelSection(
    layers=2, d_model=32, d_expert=48, n_experts=7, n_clusters=3, experts_per_token=2, residual_width=4,
    heads=4, kv_heads=2, vocabulary=320, context=128,
)  # fmt: skip
UNEVEN = [[0, 2, 2, 1, 2, 0, 1], [2, 2, 2, 1, 0, 1, 0]]


def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 5], MODEL.vocabulary)


def artifact(folder: Path, model: ModelSection = MODEL, seed: int = 0) -> Artifact:
    """Write an artifact of random weights, large enough that outputs vary."""
    transformer = Transformer(model, UNEVEN)
    transformer.initialize(seed)
    tensors = transformer.logical()
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in tensors.items():
        if key.endswith("bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        elif key in ("embedding", "head") or "router" in key:
            tensor *= 20
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    target = write_artifact(
        folder / "artifact",
        config={"preset": "test", "model": dataclasses.asdict(model)},
        tensors=tensors,
        assignment=UNEVEN,
        version=0,
        tokenizer=folder / "tokenizer.json",
        metrics={},
    )
    return Artifact.open(target)


def whole(artifact: Artifact) -> Transformer:
    """Return the whole model of an artifact, as evaluation loads it."""
    transformer = Transformer(artifact.model, artifact.assignment)
    transformer.load_logical(artifact.tensors())
    return transformer.eval()


class LocalService:
    """An engine in a thread, which asks and answers from event loops. `paused`: it takes requests, and computes none."""

    name, created, chat_template = "test", 1_700_000_000, None

    def __init__(self, artifact: Artifact, **changes: int) -> None:
        self.tokenizer, self.length = tokenizer(), artifact.model.context
        clusters = LocalClusters(artifact, range(artifact.model.n_clusters), torch.float32)
        trunk = Trunk(artifact, clusters, torch.float32, self.length)
        standard = dict(kv_bytes=1 << 20, block=4, max_running=8, max_queued=100, step_tokens=32)
        self.engine = Engine(trunk, self.tokenizer, EngineSettings(**(standard | changes)))
        self.paused, self.up, self.failing = False, True, False
        self._keys, self._commands = itertools.count(), queue.SimpleQueue[Callable[[], object] | None]()
        self._deliver: dict[Hashable, Callable[[object], object]] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        return self.up

    def pause(self, paused: bool = True) -> None:
        self.paused = paused
        self._commands.put(lambda: None)

    def close(self) -> None:
        self._commands.put(None)
        self._thread.join(timeout=10)

    async def generate(self, request: Request) -> AsyncGenerator[Increment]:
        loop, key = asyncio.get_running_loop(), next(self._keys)
        given: asyncio.Queue[object] = asyncio.Queue()
        deliver = lambda item: loop.call_soon_threadsafe(given.put_nowait, item)  # noqa: E731
        self._commands.put(lambda: self._submit(key, request, deliver))
        try:
            while True:
                item = await given.get()
                if not isinstance(item, Increment):
                    assert isinstance(item, Exception)
                    raise item
                yield item
                if item.finish:
                    return
        finally:
            self._commands.put(lambda: self._cancel(key))

    def _submit(self, key: int, request: Request, deliver: Callable[[object], object]) -> None:
        try:
            self.engine.submit(key, request)
            self._deliver[key] = deliver
        except Exception as error:
            deliver(error)

    def _cancel(self, key: int) -> None:
        if self._deliver.pop(key, None):
            self.engine.cancel(key)

    def _run(self) -> None:
        while True:
            waits = self.paused or self.engine.idle
            try:
                command = self._commands.get(block=waits)
                if command is None:
                    return
                command()
                continue
            except queue.Empty:
                pass
            if self.failing:
                for key, deliver in list(self._deliver.items()):
                    self.engine.cancel(key)
                    deliver(RuntimeError("the engine failed"))
                self._deliver.clear()
            for increment in self.engine.step():
                if deliver := self._deliver.get(increment.key):
                    deliver(increment)
