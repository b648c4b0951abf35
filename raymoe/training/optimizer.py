"""AdamW, its schedule, and its moments by logical key."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from raymoe.config import TrainSection
from raymoe.model.leaves import RESIDUALS
from raymoe.model.transformer import Transformer

MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}


def learning_rate(train: TrainSection, step: int) -> float:
    """Return the learning rate of step `step` (0-based): linear warm-up, then a cosine to `final_lr` of the peak."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    progress = (step - train.warmup) / max(1, train.steps - train.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return train.lr * (train.final_lr + (1 - train.final_lr) * cosine)


def bias_rate(train: TrainSection, step: int) -> float:
    """Return the step size of the selection biases: full during warm-up, since routers skew early, then in proportion to the learning rate."""
    return train.bias_rate * (1.0 if step < train.warmup else learning_rate(train, step) / train.lr)


def decays(name: str, parameter: Tensor) -> bool:
    """Return whether AdamW decays a parameter: matrices, but not norms, biases or residual factors."""
    leaf = name.rsplit(".", 1)[-1]
    return parameter.dim() > 1 and not leaf.endswith("norm") and leaf not in RESIDUALS


class Optimizer:
    """AdamW over the parameters of this rank. Moments have the keys `moments.m.KEY` and `moments.v.KEY`."""

    def __init__(self, transformer: Transformer, train: TrainSection) -> None:
        self.train = train
        self.adopt(transformer)

    def adopt(
        self, transformer: Transformer, moments: Mapping[str, Mapping[str, Tensor]] | None = None, updates: int = 0
    ) -> None:
        """Use the parameters of a model with these moments (zeros by default) after `updates` updates."""
        self.transformer = transformer
        train = self.train
        self.parameters = dict(transformer.named_parameters())
        decayed = [p for name, p in self.parameters.items() if decays(name, p)]
        plain = [p for name, p in self.parameters.items() if not decays(name, p)]
        self.adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": train.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=train.lr,
            betas=(0.9, train.beta2),
            fused=True,
        )
        for name, p in self.parameters.items():
            self.adam.state[p] = {"step": torch.full((), float(updates), device=p.device)}
            for short, long in MOMENTS.items():
                self.adam.state[p][long] = moments[short][name] if moments else torch.zeros_like(p)

    def step(self, rate: float) -> None:
        """Update the parameters at this learning rate."""
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Return the moments of this rank by kind (`m`, `v`) and parameter name."""
        return {
            short: {n: self.adam.state[p][name] for n, p in self.parameters.items()} for short, name in MOMENTS.items()
        }

    def logical(self) -> dict[str, Tensor]:
        """Return views of the moments by logical key."""
        views: dict[str, Tensor] = {}
        for short, stacked in self.moments().items():
            views |= {f"moments.{short}.{key}": view for key, view in self.transformer.logical(stacked).items()}
        return views

    def restore(self, updates: int) -> None:
        """Continue after `updates` updates. The caller writes the moments through `logical()`."""
        for p in self.parameters.values():
            self.adam.state[p]["step"].fill_(updates)
