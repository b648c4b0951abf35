"""Time of one MoE layer, forward and backward: the name `layer` of `jobs/benchmark.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import paper_form, private_model
from benchmarks.timing import interleaved
from raymoe.config import ModelSection
from raymoe.model import private_math
from raymoe.model.dispatch import LocalDispatch
from raymoe.model.experts import ClusteredExperts, DenseFFN, FlatExperts


class GroupedMM(nn.Module):
    """A peer: softmax top-K over independent experts with torch's `grouped_mm`."""

    def __init__(self, flat: FlatExperts) -> None:
        super().__init__()
        self.flat = flat

    def forward(self, x_TD: Tensor) -> Tensor:
        flat, k = self.flat, self.flat.model.experts_per_token
        choice = flat.router(x_TD)
        order = choice.index_TK.flatten().argsort(stable=True)
        ends = torch.bincount(choice.index_TK.flatten(), minlength=flat.model.n_experts).cumsum(0).int()
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_TD.dtype
        rows = x_TD.to(dtype).index_select(0, order // k)
        with torch.autocast("cpu", enabled=False):
            gate, up, down = (w.to(dtype) for w in (flat.gate, flat.up, flat.down))
            h = F.silu(F.grouped_mm(rows, gate, offs=ends)) * F.grouped_mm(rows, up, offs=ends)
            y = F.grouped_mm(h, down, offs=ends)
        weighted = y * choice.weight_TK.flatten()[order, None]
        return torch.zeros_like(x_TD).index_add(0, order // k, weighted.float())


def private_layer(model: ModelSection) -> ClusteredExperts:
    return ClusteredExperts(model, model.default_assignment()[0], LocalDispatch(model.n_clusters))


def layer(rounds: int) -> dict[str, Any]:
    """Measure one layer on one thread, relative to a dense FFN of the same active width."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {"private": arithmetic(rounds)}
    shapes = {
        "tiny": (2048, paper_form("tiny").model),
        "small": (2048, paper_form("small").model),
        "D=256 F=1024 E=32": (4096, replace(paper_form("small").model, d_expert=1024)),
        "D=256 F=1024 E=32 K=4": (4096, replace(paper_form("small").model, d_expert=1024, experts_per_token=4)),
    }
    for name, (tokens, model) in shapes.items():
        flat = FlatExperts(replace(model, experts="flat"), LocalDispatch(model.n_experts))
        modules: dict[str, nn.Module] = {
            "paper": ClusteredExperts(model, model.default_assignment()[0], LocalDispatch(model.n_clusters)),
            "bases alone": ClusteredExperts(
                replace(model, residual_width=0), model.default_assignment()[0], LocalDispatch(model.n_clusters)
            ),
            "private": private_layer(private_model(model)),
            "private, all active": private_layer(replace(private_model(model), experts_per_token=12)),
            "flat": flat,
            "flat, torch grouped_mm": GroupedMM(flat),
            "dense": DenseFFN(replace(model, experts="dense")),
        }
        torch.manual_seed(0)
        for module in modules.values():
            for p in module.parameters():
                nn.init.normal_(p, std=0.05)
        x = torch.randn(tokens, model.d_model, requires_grad=True)
        for precision in ("float32", "bfloat16"):

            def run(module: nn.Module, x: Tensor = x, precision: str = precision) -> None:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
                    y = module(x)
                y.backward(torch.ones_like(y))
                module.zero_grad(set_to_none=True)
                x.grad = None

            times = interleaved({n: (lambda m=m: run(m)) for n, m in modules.items()}, rounds)
            dense = times["dense"]["median_ms"]
            for side in times.values():
                side["of_dense"] = side["median_ms"] / dense
            result[f"{name} {precision}"] = times
            print(f"{name:24}{precision:10}" + "  ".join(f"{n} {t['of_dense']:.2f}" for n, t in times.items()))
    return result


def arithmetic(rounds: int) -> dict[str, Any]:
    """Measure both forms of the private experts' arithmetic by the ratio of experts to active experts (`WIDEST`)."""
    result: dict[str, Any] = {}
    for k in (12, 10, 8, 6):
        module = private_layer(replace(private_model(paper_form("small").model), experts_per_token=k))
        torch.manual_seed(0)
        for p in module.parameters():
            nn.init.normal_(p, std=0.05)
        x = torch.randn(2048, module.model.d_model, requires_grad=True)

        def run(widest: float, module: nn.Module = module, x: Tensor = x) -> None:
            private_math.WIDEST = widest
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = module(x)
            y.backward(torch.ones_like(y))
            module.zero_grad(set_to_none=True)
            x.grad = None

        usual = private_math.WIDEST
        times = interleaved({"wide": lambda run=run: run(float("inf")), "pairs": lambda run=run: run(0.0)}, rounds)
        private_math.WIDEST = usual
        ratio = times["wide"]["median_ms"] / times["pairs"]["median_ms"]
        result[f"{k} of 12"] = times
        print(f"private, {k} of 12 active, bfloat16: wide products take {ratio:.2f} of sorted pairs")
    return result
