"""The whole model: KV cache, causal mask, logical names and initial weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from raymoe.config import ModelSection, preset
from raymoe.model.leaves import member_leaves
from raymoe.model.transformer import KVCache, Transformer
from tests.support.presets import residual_tiny

MODEL = ModelSection(
    layers=2, d_model=32, d_expert=24, n_experts=8, n_clusters=2, experts_per_token=2, residual_width=4,
    heads=4, kv_heads=2, vocabulary=50, context=16,
)  # fmt: skip
KINDS = [MODEL, replace(MODEL, experts="flat"), replace(MODEL, experts="dense"), replace(MODEL, tied_head=False)]


def build(model: ModelSection, seed: int = 0) -> Transformer:
    transformer = Transformer(model)
    transformer.initialize(seed)
    return transformer


@pytest.mark.parametrize("model", KINDS)
def test_cached_decoding_equals_one_pass(model: ModelSection) -> None:
    transformer = build(model)
    tokens = torch.randint(50, (3, 12))
    with torch.no_grad():
        whole = transformer(tokens)
        cache = KVCache(model, batch=3, capacity=12)
        pieces = [transformer(part, cache) for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:10], tokens[:, 10:])]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="holds 12 tokens"):
        transformer(tokens[:, :1], cache)


@pytest.mark.parametrize("model", KINDS)
def test_logits_do_not_depend_on_later_tokens(model: ModelSection) -> None:
    transformer = build(model)
    tokens = torch.randint(50, (1, 10))
    changed = tokens.clone()
    changed[0, 6:] = (changed[0, 6:] + 1) % 50
    with torch.no_grad():
        before, after = transformer(tokens), transformer(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=1e-4, atol=1e-5)
    assert (before[:, 6:] - after[:, 6:]).abs().max() > 1e-3


@pytest.mark.parametrize("model", KINDS)
def test_every_weight_has_one_logical_name(model: ModelSection) -> None:
    transformer = build(model)
    logical = transformer.logical()
    weights = sum(p.numel() for p in transformer.parameters())
    biases = sum(b.numel() for name, b in transformer.named_buffers() if name.endswith("bias"))
    assert sum(v.numel() for v in logical.values()) == weights + biases
    other = Transformer(model)
    other.load_logical({k: v.clone() for k, v in logical.items()})
    for (name, a), (_, b) in zip(transformer.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    missing = dict(logical)
    del missing["final_norm"]
    with pytest.raises(ValueError, match="final_norm"):
        other.load_logical(missing)
    with pytest.raises(ValueError, match="shape"):
        other.load_logical({**logical, "final_norm": torch.ones(3)})


def test_logical_names_of_experts_do_not_depend_on_their_cluster() -> None:
    uneven = ((1, 0, 1, 1, 0, 1, 1, 1), (0, 0, 0, 1, 0, 0, 0, 1))
    model, moved = build(MODEL), Transformer(MODEL, uneven)
    moved.initialize(0)
    a, b = model.logical(), moved.logical()
    assert set(a) == set(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("model", [preset("tiny").model, residual_tiny().model], ids=["private", "residual"])
def test_initial_activations_and_loss_are_in_range(model: ModelSection) -> None:
    transformer = build(model)
    tokens = torch.randint(2048, (2, 64))
    with torch.no_grad():
        hidden = transformer.hidden(tokens)
        logits = transformer(tokens)
    assert 0.5 < hidden.std() < 2
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - torch.tensor(2048.0).log().item()) < 0.3
    experts = transformer.logical()
    for leaf in member_leaves(model):
        assert not torch.equal(experts[f"layers.0.experts.0.{leaf}"], experts[f"layers.0.experts.1.{leaf}"]), leaf


def test_initialization_law() -> None:
    """Standard deviations are 1/√fan-in, less for matrices that write to the residual stream, times 0.3 for outer factors."""
    model = replace(MODEL, d_model=64, d_expert=96, heads=4, residual_width=8, vocabulary=400, router_std=0.07)
    quieter = (2 * model.layers) ** -0.5
    d, f, w = 64**-0.5, 96**-0.5, 8**-0.5
    laws = {
        "embedding": 0.02, "query": d, "key": d, "value": d, "output": d * quieter,
        "base_gate": d, "base_up": d, "base_down": f * quieter,
        "gate_in": d, "up_in": d, "down_in": f, "gate_out": 0.3 * w, "up_out": 0.3 * w, "down_out": 0.3 * w * quieter,
        "router": 0.07, "weight": 0.07,
    }  # fmt: skip
    found: dict[str, list[torch.Tensor]] = {}
    for key, view in build(model).logical().items():
        leaf = key.rsplit(".", 1)[-1]
        if leaf.endswith("norm"):
            assert (view == 1).all(), key
        elif leaf == "bias":
            assert (view == 0).all(), key
        else:
            found.setdefault(leaf, []).append(view.flatten())
    assert found.keys() == laws.keys()
    for leaf, views in found.items():
        values = torch.cat(views)
        assert values.std().item() == pytest.approx(laws[leaf], rel=5 / len(values) ** 0.5), leaf
        assert abs(values.mean().item()) < 5 * laws[leaf] / len(values) ** 0.5, leaf


def test_initial_private_experts() -> None:
    """Each matrix has std 1/√fan-in; the one that writes to the residual stream is smaller."""
    experts = build(replace(MODEL, d_model=64, expert_kind="private", expert_width=48, heads=4)).logical()
    quieter = (2 * MODEL.layers) ** -0.5
    for leaf, std in (("gate", 64**-0.5), ("up", 64**-0.5), ("down", 48**-0.5 * quieter)):
        values = torch.cat([t.flatten() for key, t in experts.items() if key.endswith(f"private_{leaf}")])
        assert values.std().item() == pytest.approx(std, rel=5 / len(values) ** 0.5), leaf


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_a_residual_starts_at_three_tenths_of_its_base(name: str) -> None:
    experts = build(replace(MODEL, d_model=64, d_expert=96, heads=4, residual_width=8)).logical()
    base = experts[f"layers.0.clusters.0.base_{name}"]
    residual = experts[f"layers.0.experts.0.{name}_in"] @ experts[f"layers.0.experts.0.{name}_out"]
    assert residual.norm() / base.norm() == pytest.approx(0.3, rel=0.15)
