"""Fine-tuning of a whole model and a new head on one task, in this process.

The head is linear, on the normalized hidden state of a sequence's last token. All weights train, except for the
language model's own head where it is not tied to the embedding: no loss depends on it. Clusters keep their experts.

The selection biases of the routers stay as trained. They balance the load between workers, and fine-tuning has one
process; a moving bias would change the choice of experts without any gradient, and from batches that are part padding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymoe.config.checks import require
from raymoe.finetune.batches import Encoded, by_length, epoch, pad
from raymoe.finetune.metrics import score
from raymoe.finetune.tasks import Task
from raymoe.model.transformer import Transformer
from raymoe.training.optimizer import decays

WARMUP = 0.06
"""Share of the steps with a linearly increasing learning rate; it decreases linearly to 0 afterwards."""
WEIGHT_DECAY = 0.01
BETAS = (0.9, 0.999)
CLIP = 1.0
"""Maximum global norm of the gradient."""
HEAD_STD = 0.02
"""Standard deviation of the initial head weights; the bias is 0."""

Initial = Literal["pretrained", "random"]


@dataclass(frozen=True)
class Settings:
    """How a model is fine-tuned; all seeds of a result share them."""

    epochs: int = 3
    batch: int = 32
    """Examples per step."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Autocast type of matrix products, in training and evaluation."""
    train_examples: int | None = None
    """Number of training examples, drawn once for all models and seeds; None: all."""
    initial: Initial = "pretrained"
    """First weights. `random`: those of a new model of the same architecture, drawn by the seed."""

    def __post_init__(self) -> None:
        for option, value in (("epochs", self.epochs), ("batch", self.batch), ("train-examples", self.train_examples)):
            require(value is None or value >= 1, f"--{option}", value, "at least 1")
        require(0 < self.lr < math.inf, "--lr", self.lr, "must be finite and greater than 0")


@dataclass(frozen=True)
class Outcome:
    """Result of one seed."""

    scores: dict[str, float]
    """On the dev sets after the last epoch, by name of the score."""
    train_loss: float
    """Mean over the last epoch: nats, or squared standard deviations of the training scores for a regression."""
    steps: int
    seconds: float
    """Wall time of training and evaluation."""


class Classifier(nn.Module):
    """A transformer with a linear head: tokens [B, S] -> outputs [B, O] in the type of the weights."""

    def __init__(self, transformer: Transformer, n_outputs: int, seed: int) -> None:
        super().__init__()
        self.transformer = transformer
        d, like = transformer.model.d_model, transformer.embedding
        weight_OD = torch.empty(n_outputs, d).normal_(0.0, HEAD_STD, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(weight_OD.to(like))
        self.bias = nn.Parameter(like.new_zeros(n_outputs))

    def forward(self, tokens_BS: Tensor, last_B: Tensor) -> Tensor:
        """Attention is causal, so no token before `last_B`, and no output, depends on the padding after it."""
        hidden_BSD = self.transformer.hidden(tokens_BS)
        pooled_BD = hidden_BSD[torch.arange(len(last_B)), last_B]
        with torch.autocast(pooled_BD.device.type, enabled=False):
            return F.linear(pooled_BD.to(self.weight.dtype), self.weight, self.bias)


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Return the rate of step `step` (0-based) of `steps`: linear warm-up, then linear decay to 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / (steps - warmup)


def draw(n_examples: int, settings: Settings) -> np.ndarray:
    """Return the indices of the training examples: all, or a sample that depends on the settings alone."""
    count = min(settings.train_examples or n_examples, n_examples)
    return np.sort(np.random.default_rng(0).permutation(n_examples)[:count])


def run_seed(
    transformer: Transformer,
    task: Task,
    train: Encoded,
    dev: dict[str, Encoded],
    settings: Settings,
    seed: int,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Outcome:
    """Fine-tune `transformer` in place and evaluate it on the dev sets once, after the last epoch.

    The dev sets decide nothing: no epoch, learning rate or seed is chosen by them. The seed draws the head, the order
    of the examples and, with random initial weights, all weights. `progress` receives steps done and in total.
    Raises FloatingPointError if the loss or an output is not finite, ValueError for a regression with equal scores.
    """
    started = time.perf_counter()
    if settings.initial == "random":
        transformer.initialize(seed)
    classifier = Classifier(transformer, task.n_outputs, seed)
    center, scale = (0.0, 1.0) if task.labels else _standard(train.label_N)
    target_N = torch.from_numpy((train.label_N - center) / scale).to(torch.int64 if task.labels else torch.float32)
    loss, steps = fit(classifier, train, target_N, settings, seed, progress)
    predictions = {split: predict(classifier, encoded, settings) for split, encoded in dev.items()}
    scores = score(task, predictions, {split: encoded.label_N for split, encoded in dev.items()})
    return Outcome(scores, loss, steps, time.perf_counter() - started)


def _standard(label_N: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation of scores. A correlation does not depend on either."""
    if np.ptp(label_N) == 0:
        raise ValueError("all training scores are equal, and a regression needs two values: give more examples")
    return float(label_N.mean()), float(label_N.std())


def fit(
    classifier: Classifier,
    train: Encoded,
    target_N: Tensor,
    settings: Settings,
    seed: int,
    progress: Callable[[int, int], Any],
) -> tuple[float, int]:
    """Train on all examples for the epochs of the settings. Return the mean loss of the last epoch, and the steps."""
    adam, lengths = _optimizer(classifier, settings.lr), np.array([len(row) for row in train.sequences])
    steps = settings.epochs * len(epoch(lengths, settings.batch, np.random.default_rng(0)))
    step, total = 0, 0.0
    for turn in range(settings.epochs):
        total = 0.0
        for indices in epoch(lengths, settings.batch, np.random.default_rng((seed, turn))):
            with _autocast(settings):
                outputs_BO = classifier(*pad(train, indices))
            loss = _loss(outputs_BO, target_N[torch.from_numpy(indices)])
            adam.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(classifier.parameters(), CLIP)
            if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
                raise FloatingPointError(
                    f"the loss or its gradient is not finite at step {step} of {steps}, seed {seed}: give a lower --lr"
                )
            for group in adam.param_groups:
                group["lr"] = learning_rate(settings.lr, step, steps)
            adam.step()
            step, total = step + 1, total + loss.item() * len(indices)
            progress(step, steps)
    return total / len(train.sequences), steps


def _optimizer(classifier: Classifier, lr: float) -> torch.optim.AdamW:
    parameters = list(classifier.named_parameters())
    groups = [
        {"params": [p for name, p in parameters if decays(name, p) is decayed], "weight_decay": WEIGHT_DECAY * decayed}
        for decayed in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)


def _loss(outputs_BO: Tensor, target_B: Tensor) -> Tensor:
    if target_B.is_floating_point():
        return F.mse_loss(outputs_BO[:, 0], target_B)
    return F.cross_entropy(outputs_BO, target_B)


@torch.no_grad()
def predict(classifier: Classifier, encoded: Encoded, settings: Settings) -> np.ndarray:
    """Return the label or the standardized score of each example, [N]. Raises FloatingPointError for other outputs."""
    found_N = np.empty(len(encoded.sequences))
    for indices in by_length(np.array([len(row) for row in encoded.sequences]), settings.batch):
        with _autocast(settings):
            outputs_BO = classifier(*pad(encoded, indices))
        if not outputs_BO.isfinite().all():
            raise FloatingPointError("an output of the model is not finite: give a lower --lr")
        found_N[indices] = (outputs_BO.argmax(-1) if outputs_BO.shape[1] > 1 else outputs_BO[:, 0]).numpy()
    return found_N


def _autocast(settings: Settings) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.precision == "bfloat16")
