"""An artifact as a model in this process: completions without a server, with the server's checks of a request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from raymoe.serving.engine.cluster import LocalClusters
from raymoe.serving.engine.engine import Engine, EngineSettings
from raymoe.serving.engine.trunk import Trunk
from raymoe.serving.http.bodies import CompletionBody, parse
from raymoe.serving.http.make_requests import completion_requests
from raymoe.serving.http.prompts import Codec
from raymoe.serving.settings import PRECISIONS
from raymoe.storage.artifact import Artifact


class LocalModel:
    """A model with all of its clusters in this process.

    model = raymoe.load("first")
    model.generate("Once upon a time", max_tokens=32)
    """

    def __init__(self, artifact: Artifact, precision: str = "float32") -> None:
        """precision: type of the computation, float32 or bfloat16. Raises ValueError or CorruptArtifact."""
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} is not allowed: {' or '.join(PRECISIONS)}")
        dtype = PRECISIONS[precision]
        self.artifact, self.context = artifact, artifact.model.context
        self.tokenizer = artifact.tokenizer()
        clusters = LocalClusters(artifact, range(artifact.model.n_clusters), dtype)
        self._trunk = Trunk(artifact, clusters, dtype, self.context)
        self._codec = Codec(self.tokenizer)

    def __repr__(self) -> str:
        return f"LocalModel({str(self.artifact.folder)!r}, context={self.context})"

    def generate(self, prompt: str | Sequence[str], **options: Any) -> Any:
        """Return the completion of a prompt (str), or of each prompt (list of str).

        options: fields of the body of `/v1/completions`, for example max_tokens, temperature, top_p, seed, stop.
        Raises ValueError for an invalid option, and for a prompt and completion that exceed the context.
        """
        single = isinstance(prompt, str)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = [""] * len(prompts)
        for index, text in self.stream(prompts, **options):
            texts[index] += text
        return texts[0] if single else texts

    def stream(self, prompts: Sequence[str], **options: Any) -> Iterator[tuple[int, str]]:
        """Return an iterator of (index of the prompt, next piece of its completion). All prompts advance together.

        Raises ValueError, like `generate`, before the first piece.
        """
        body = parse(json.dumps({"prompt": list(prompts), **options}).encode(), CompletionBody)
        requests = completion_requests(body, self._codec, self.context, len(prompts))
        engine = Engine(self._trunk, self.tokenizer, EngineSettings(max_queued=len(requests)))
        for i, request in enumerate(requests):
            engine.submit(i, request)
        return _pieces(engine)


def _pieces(engine: Engine) -> Iterator[tuple[int, str]]:
    while not engine.idle:
        for increment in engine.step():
            assert isinstance(increment.key, int)
            yield increment.key, increment.text
