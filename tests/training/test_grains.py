"""The loss of a batch in which only some targets count: answers of conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from prometheus_client import CollectorRegistry

from raymoe.config import Config, override
from raymoe.data.corpus import Corpus
from raymoe.evaluation import perplexity
from raymoe.metrics import TrainingMetrics
from raymoe.model.transformer import Transformer
from raymoe.storage.run_folder import read_records
from raymoe.training.grains import Grains
from raymoe.training.loop import Trainer
from tests.data.test_chat import conversation, prepared, write
from tests.support import processes
from tests.training.test_loop import config as settings_of

CONTEXT = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("chat")
    write(folder / "text" / "d.jsonl", [conversation(i, turns=1 + i % 3) for i in range(150)])
    return prepared(folder / "text", folder / "cache")


def config(*changes: str) -> Config:
    small = [
        "model.vocabulary=300",
        f"model.context={CONTEXT}",
        "train.steps=4",
        "regroup.mode=off",
        "train.log_every=1",
    ]
    return override(settings_of(), [*small, *changes])


def test_targets_that_do_not_count_have_no_gradient_and_the_others_that_of_the_plain_loss(corpus: Corpus) -> None:
    grains = Grains(config(), corpus, torch.device("cpu"), 0, 1)
    batch = grains.read(0, range(8))
    assert 0 < batch.mask.sum() < batch.mask.size and grains.targets(0) == batch.mask.sum()
    hidden = torch.randn(8, CONTEXT, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(300, 12, dtype=torch.float64, requires_grad=True)
    _, targets = grains.tensors(batch)
    loss = grains.loss(hidden, weight, targets, batch)
    ours = torch.autograd.grad(loss, (hidden, weight))
    assert not ours[0][~torch.from_numpy(batch.mask)].any()
    ignored = torch.where(torch.from_numpy(batch.mask), targets, -100)
    plain = F.cross_entropy((hidden @ weight.t()).flatten(0, 1), ignored.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss, plain, rtol=1e-10, atol=0)
    for a, b in zip(ours, torch.autograd.grad(plain, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_other_answers_change_the_loss_and_other_questions_only_through_the_model(corpus: Corpus) -> None:
    grains = Grains(config(), corpus, torch.device("cpu"), 0, 1)
    batch = grains.read(0, range(8))
    hidden, weight = torch.randn(8, CONTEXT, 12), torch.randn(300, 12)
    mask = torch.from_numpy(batch.mask)
    _, targets = grains.tensors(batch)
    loss = grains.loss(hidden, weight, targets, batch)
    assert torch.equal(grains.loss(hidden, weight, torch.where(mask, targets, 5), batch), loss)
    assert not torch.equal(grains.loss(hidden, weight, torch.where(mask, 5, targets), batch), loss)


def test_a_batch_without_a_target_has_a_loss_of_zero(corpus: Corpus) -> None:
    grains = Grains(config(), corpus, torch.device("cpu"), 0, 1)
    batch = grains.read(0, range(2))._replace(mask=np.zeros((2, CONTEXT), dtype=bool))
    hidden = torch.randn(2, CONTEXT, 12, requires_grad=True)
    loss = grains.loss(hidden, torch.randn(300, 12), grains.tensors(batch)[1], batch)
    loss.backward()
    assert loss == 0 and hidden.grad is not None and not hidden.grad.any()


def train(rank: int, world: int, run: Path, corpus: Path) -> dict[str, Any]:
    metrics = TrainingMetrics(CollectorRegistry(), run="test", worker=str(rank))
    trainer = Trainer(config(), Corpus.open(corpus), run, metrics, torch.device("cpu"))
    trainer.train()
    return {key: view.clone() for key, view in trainer.model.logical().items()}


@pytest.mark.dist
def test_the_loss_is_the_mean_over_the_answers_of_the_global_batch_on_any_number_of_workers(
    corpus: Corpus, tmp_path: Path
) -> None:
    losses = []
    for world in (1, 3):
        run = tmp_path / f"world{world}"
        run.mkdir()
        if world == 1:
            train(0, 1, run, corpus.folder)
        else:
            processes.run(world, train, run, corpus.folder, folder=tmp_path)
        losses.append([r["loss"] for r in read_records(run / "metrics.jsonl") if r["kind"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    model = Transformer(config().model)
    model.initialize(config().run.seed)
    batch = Grains(config(), corpus, torch.device("cpu"), 0, 1).read(0, range(8))
    with torch.no_grad():
        logits = model(torch.from_numpy(batch.tokens[:, :-1]))
    nll = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.tokens[:, 1:]).flatten(), reduction="none")
    assert losses[0][0] == pytest.approx(nll[torch.from_numpy(batch.mask).flatten()].mean().item(), rel=1e-5)


def test_validation_is_over_the_answers_and_agrees_with_the_evaluation(corpus: Corpus, tmp_path: Path) -> None:
    """The evaluation also scores the first token of the text, which is no answer."""
    metrics = TrainingMetrics(CollectorRegistry(), run="test", worker="0")
    trainer = Trainer(config("train.precision=float32"), corpus, tmp_path, metrics, torch.device("cpu"))
    trainer.validate(whole=True)
    text = corpus.validation_text()["d"]
    with torch.no_grad():
        stream = text.tokens[1:]  # windows of training start at the first token, as an input
        found = perplexity(
            trainer.model,
            stream,
            n_bytes=text.bytes,
            context=CONTEXT,
            first=int(text.tokens[0]),
            counted=text.counted[1:],  # type: ignore[index]
        )
    assert found.tokens == corpus.counted("validation", "d").sum()  # type: ignore[union-attr]
    (record,) = [r for r in read_records(tmp_path / "metrics.jsonl") if r["kind"] == "validation"]
    assert record["loss"] == pytest.approx(found.loss, rel=1e-5)
