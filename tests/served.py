"""A small artifact with a real tokenizer, for tests of serving."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from tokenizers import Tokenizer

from raymoe.config import ModelSection
from raymoe.model.transformer import Transformer
from raymoe.storage.export import Artifact, write_artifact
from raymoe.tokens import train_tokenizer

TEXT = "The cat sat on the mat; the dog, naïve as ever, ran after 42 birds. Ünïcode: 日本語, 🙂 and 🚀! "
MODEL = ModelSection(
    layers=2, d_model=32, d_expert=48, n_experts=7, n_clusters=3, experts_per_token=2, residual_width=4,
    heads=4, kv_heads=2, vocabulary=320, context=128,
)  # fmt: skip
UNEVEN = [[0, 2, 2, 1, 2, 0, 1], [2, 2, 2, 1, 0, 1, 0]]


def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 5], MODEL.vocabulary)


def artifact(folder: Path, model: ModelSection = MODEL, seed: int = 0) -> Artifact:
    """Random weights of a size that makes answers vary."""
    transformer = Transformer(model, UNEVEN)
    transformer.initialise(seed)
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
    """What evaluation makes of it."""
    transformer = Transformer(artifact.model, artifact.assignment)
    transformer.load_logical(artifact.tensors())
    return transformer.eval()
