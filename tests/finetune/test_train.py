"""Fine-tuning: outputs do not depend on the batch, all weights train, a simple task is learned, seeds reproduce."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from raymoe.config import ModelSection
from raymoe.finetune.batches import Encoded, pad
from raymoe.finetune.tasks import TASKS
from raymoe.finetune.train import Classifier, Settings, draw, learning_rate, predict, run_seed
from raymoe.model.transformer import Transformer

MODEL = ModelSection(
    layers=2, d_model=32, d_expert=32, n_experts=6, n_clusters=3, experts_per_token=2, residual_width=4,
    heads=2, kv_heads=1, vocabulary=40, context=24,
)  # fmt: skip
FAST = Settings(epochs=3, batch=16, lr=3e-3)


def model(experts: str = "clustered") -> Transformer:
    transformer = Transformer(dataclasses.replace(MODEL, experts=experts))
    transformer.initialize(0)
    with torch.no_grad():
        for name, buffer in transformer.named_buffers():
            buffer.copy_(torch.linspace(-0.1, 0.1, buffer.numel()).view_as(buffer))
            assert name.endswith("bias")
    return transformer


def toy(n: int, seed: int, *, regression: bool = False) -> Encoded:
    """Sequences of token 0 and others; the label is whether (how often) token 7 occurs."""
    generator = np.random.default_rng(seed)
    rows = [np.array([0, *generator.integers(8, 40, generator.integers(2, 20))], dtype=np.int64) for _ in range(n)]
    count = generator.integers(0, 6 if regression else 2, n)
    for row, times in zip(rows, count, strict=True):
        places = generator.permutation(np.arange(1, len(row)))[:times]
        row[places] = 7
    label = [min(times, len(row) - 1) for times, row in zip(count, rows, strict=True)]
    return Encoded(rows, np.array(label, dtype=np.float64), 0, MODEL.context, 0)


@pytest.mark.parametrize("experts", ["clustered", "flat", "dense"])
def test_an_output_does_not_depend_on_the_batch(experts: str) -> None:
    """In float64: sums in another order differ in the last digits only."""
    classifier, encoded = Classifier(model(experts).double(), 3, 0), toy(12, 0)
    together_BO = classifier(*pad(encoded, np.arange(12)))
    for i in range(12):
        tokens_S = torch.from_numpy(encoded.sequences[i])
        alone_O = classifier(tokens_S[None], torch.tensor([len(tokens_S) - 1]))[0]
        torch.testing.assert_close(together_BO[i], alone_O, rtol=1e-10, atol=1e-10)
    assert (together_BO.std(0) > 1e-4).all()


@pytest.mark.parametrize("experts", ["clustered", "flat", "dense"])
def test_a_simple_task_is_learned(experts: str) -> None:
    found = run_seed(model(experts), TASKS["sst2"], toy(800, 1), {"": toy(200, 2)}, FAST, 0)
    assert found.scores["accuracy"] > 0.9 and found.steps == 150 and found.train_loss < 0.5


def test_a_regression_is_learned_on_standardized_scores() -> None:
    found = run_seed(model(), TASKS["stsb"], toy(800, 1, regression=True), {"": toy(200, 2, regression=True)}, FAST, 0)
    assert found.scores["Pearson"] > 0.8 and found.scores["Spearman"] > 0.8


def test_all_weights_train_and_the_selection_biases_stay() -> None:
    transformer = model()
    before = copy.deepcopy(transformer)
    run_seed(transformer, TASKS["sst2"], toy(64, 1), {"": toy(8, 2)}, dataclasses.replace(FAST, epochs=1), 0)
    changed = {
        n: not torch.equal(p, q) for (n, p), q in zip(transformer.named_parameters(), before.parameters(), strict=True)
    }
    assert all(changed.values()), changed
    assert all(torch.equal(a, b) for a, b in zip(transformer.buffers(), before.buffers(), strict=True))


def test_a_seed_reproduces_its_result_and_seeds_differ() -> None:
    settings = dataclasses.replace(FAST, epochs=1)

    def run(seed: int, initial: str = "pretrained") -> float:
        now = dataclasses.replace(settings, initial=initial)
        return run_seed(model(), TASKS["sst2"], toy(64, 1), {"": toy(32, 2)}, now, seed).train_loss

    assert run(0) == run(0) != run(1)
    assert run(0, "random") == run(0, "random") != run(0)


def test_random_first_weights_ignore_the_pretrained_ones() -> None:
    settings = dataclasses.replace(FAST, epochs=1, initial="random")
    losses = []
    for factor in (1.0, 2.0):
        transformer = model()
        with torch.no_grad():
            for p in (*transformer.parameters(), *transformer.buffers()):
                p *= factor
        losses.append(run_seed(transformer, TASKS["sst2"], toy(64, 1), {"": toy(8, 2)}, settings, 3).train_loss)
    assert losses[0] == losses[1]


def test_predictions_are_in_the_order_of_the_examples() -> None:
    classifier, encoded = Classifier(model(), 2, 0), toy(50, 3)
    settings = Settings(batch=7, precision="float32")
    alone = [classifier(*pad(encoded, np.array([i]))).argmax().item() for i in range(50)]
    assert predict(classifier, encoded, settings).tolist() == alone
    assert len(set(alone)) == 2


def test_the_learning_rate_warms_up_for_6_percent_and_decays_to_zero() -> None:
    rates = [learning_rate(1.0, step, 100) for step in range(100)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert rates[6:] == pytest.approx([(100 - step) / 94 for step in range(6, 100)])
    assert learning_rate(1.0, 0, 1) == 1


def test_the_sample_of_training_examples_is_one_for_all_seeds() -> None:
    few = draw(100, Settings(train_examples=10))
    assert len(set(few.tolist())) == 10 and few.tolist() == draw(100, Settings(train_examples=10)).tolist()
    assert draw(5, Settings(train_examples=10)).tolist() == draw(5, Settings()).tolist() == [0, 1, 2, 3, 4]


def test_a_loss_that_is_not_finite_fails_with_a_remedy() -> None:
    transformer = model()
    with torch.no_grad():
        transformer.embedding[7] = torch.nan
    with pytest.raises(FloatingPointError, match=r"step 0 of .*, seed 4: give a lower --lr"):
        run_seed(transformer, TASKS["sst2"], toy(64, 1), {"": toy(8, 2)}, FAST, 4)


def test_an_output_that_is_not_finite_is_no_prediction() -> None:
    classifier = Classifier(model(), 2, 0)
    with torch.no_grad():
        classifier.bias[1] = torch.nan
    with pytest.raises(FloatingPointError, match="give a lower --lr"):
        predict(classifier, toy(4, 0), FAST)


def test_equal_scores_are_refused() -> None:
    data = toy(8, 0)
    data.label_N[:] = 2.5
    with pytest.raises(ValueError, match="all training scores are equal"):
        run_seed(model(), TASKS["stsb"], data, {"": data}, FAST, 0)


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"batch": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"train_examples": 0}]
)
def test_bad_settings_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="--"):
        Settings(**options)
