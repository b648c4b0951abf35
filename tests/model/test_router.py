"""Gradients of both routers and the balancing of their loads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.config import ModelSection
from raymoe.model.dispatch import LocalDispatch
from raymoe.model.experts import ClusteredExperts, Member
from raymoe.model.router import auxiliary_loss, joint_scores, move_bias, route


@pytest.mark.parametrize("k", [1, 2, 3])
def test_gradcheck_of_both_routers_with_a_fixed_selection(k: int) -> None:
    """Check u (stage 1) and v (stage 2) through the whole layer. Large biases fix the selection under perturbation."""
    model = ModelSection(
        layers=1, d_model=6, heads=1, kv_heads=1, d_expert=4, n_experts=8, n_clusters=2, experts_per_token=k,
        residual_width=2,
    )  # fmt: skip
    layer = ClusteredExperts(model, model.default_assignment()[0], LocalDispatch(2)).double()
    generator = torch.Generator().manual_seed(k)
    for p in layer.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    layer.router.bias[1] = 50.0
    layer.expert_bias[:] = torch.arange(8.0).double() * 50

    def loss(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"router.weight": u, "expert_router": v}, (x,))

    u, v = layer.router.weight, layer.expert_router
    assert torch.autograd.gradcheck(loss, (u, v))
    du, dv = torch.autograd.grad(loss(u, v).sum(), (u, v))
    assert du.abs().max() > 1e-6 and dv.abs().max() > 1e-6


def test_bias_changes_the_choice_but_not_the_weights() -> None:
    x, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 1.0]])
    plain = route(x, weight, torch.zeros(3), 1, gate="all")
    pushed = route(x, weight, torch.tensor([0.0, 0.6, 0.0]), 1, gate="all")
    assert (plain.index_TK.item(), pushed.index_TK.item()) == (0, 1)
    assert torch.equal(plain.probability_TG, pushed.probability_TG)
    assert pushed.weight_TK.item() == pytest.approx(plain.probability_TG[0, 1].item())


def test_sigmoid_weights_are_sigmoids_normalized_over_the_choices() -> None:
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    logits = x @ weight.t()
    one, two = (route(x, weight, torch.zeros(5), k, gate="sigmoid") for k in (1, 2))
    torch.testing.assert_close(one.weight_TK, logits.amax(-1, keepdim=True).sigmoid())
    chosen = logits.topk(2).values.sigmoid()
    torch.testing.assert_close(two.weight_TK, chosen / chosen.sum(-1, keepdim=True))


def test_sigmoid_weights_are_finite_where_every_sigmoid_underflows() -> None:
    x = torch.tensor([[-200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [1.0], [1.5]])
    choice = route(x, weight, torch.zeros(3), 2, gate="sigmoid")
    torch.testing.assert_close(choice.weight_TK, torch.tensor([[0.5, 0.5]]))
    choice.weight_TK[0, 0].backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_float32_even_under_autocast(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 16).to(dtype), torch.randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        choice = route(x, weight, torch.zeros(3), 2, gate="selected")
    expected = (x.float() @ weight.t()).softmax(-1)
    assert choice.weight_TK.dtype == torch.float32
    torch.testing.assert_close(choice.probability_TG, expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**30))
def test_moving_the_bias_balances_a_skewed_router(groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(4000, groups, generator=generator) + torch.randn(groups, generator=generator)
    bias = torch.zeros(groups)
    for step in range(400):
        counts = torch.bincount((scores + bias).argmax(1), minlength=groups)
        move_bias(bias, counts, 0.1 if step < 200 else 0.02)
    assert counts.float().std(correction=0) / counts.float().mean() < 0.1
    assert bias.mean().abs() < 1e-5


def test_auxiliary_loss_is_minimal_when_balanced() -> None:
    def value(logits: torch.Tensor) -> float:
        return auxiliary_loss(route(logits, torch.eye(4), torch.zeros(4), 1, gate="all"), 4).item()

    balanced = torch.eye(4).repeat(3, 1) * 5
    assert value(balanced) == pytest.approx(12.0)  # rows · 1
    assert value(torch.eye(4)[:1].repeat(12, 1) * 5) > 40


def test_a_step_of_the_bias_is_clamped_to_the_rate() -> None:
    """One group has the whole load: its relative surplus is 3 and its step is the rate. The others rise by the rate."""
    bias = torch.zeros(4)
    move_bias(bias, torch.tensor([400, 0, 0, 0]), 0.1)
    torch.testing.assert_close(bias, torch.tensor([-0.15, 0.05, 0.05, 0.05]))  # -0.1 and +0.1, mean removed
    bias = torch.zeros(2)
    move_bias(bias, torch.tensor([110, 90]), 0.1)
    torch.testing.assert_close(bias, torch.tensor([-0.01, 0.01]))  # below the clamp: in proportion


def test_shares_change_the_load_at_which_a_bias_is_stationary() -> None:
    bias = torch.zeros(3)
    move_bias(bias, torch.tensor([40, 40, 20]), 0.1, torch.tensor([1.0, 1.0, 0.5]))
    assert torch.equal(bias, torch.zeros(3))
    move_bias(bias, torch.tensor([40, 40, 20]), 0.1)
    assert bias[2] > 0 > bias[0]


def test_a_ghost_and_its_expert_share_one_load_while_they_move() -> None:
    """At progress 0.25 the target of a moving expert is a quarter of an even load, and of its ghost three quarters."""
    model = ModelSection(
        layers=1, d_model=6, heads=1, kv_heads=1, d_expert=4, n_experts=6, n_clusters=2, experts_per_token=1,
        residual_width=2,
    )  # fmt: skip
    layer = ClusteredExperts(model, [1, 0, 0, 1, 1, 1], LocalDispatch(2), ghosts={0: 0})
    layer.set_progress(0.25)
    shares = dict(zip(layer.local_members, layer.share_e.tolist(), strict=True))
    assert shares[Member(0)] == 0.25 and shares[Member(0, ghost=True)] == 0.75 and shares[Member(1)] == 1.0
    load = torch.tensor(
        [100, 400, 400, 400, 400, 400] + [300, 0, 0, 0, 0, 0]
    )  # experts, then ghosts: all at their targets
    layer.balance(torch.tensor([1100, 1300]), load, 0.1)
    torch.testing.assert_close(layer.expert_bias, torch.zeros(7))
    load[6] = 400  # the ghost has an even load, above its target
    layer.balance(torch.tensor([1100, 1300]), load, 0.1)
    bias = dict(zip(layer.local_members, layer.expert_bias.tolist(), strict=True))
    assert bias[Member(0, ghost=True)] < 0 < bias[Member(1)] and bias[Member(0)] == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**30), st.permutations([0, 0, 0, 1, 1, 3, 3, 3]))
def test_joint_scores_are_the_probabilities_of_the_two_stage_choice(seed: int, clusters: list[int]) -> None:
    """Cluster 2 has no experts. An offset of a cluster's stage-2 logits changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, u, v, b, a = draw(5, 6), draw(4, 6), draw(8, 6), draw(4), draw(8)
    cluster = torch.tensor(clusters)
    scores = joint_scores(x, u, b, v, a, cluster)
    first, second = (x @ u.t() + b).softmax(-1), x @ v.t() + a
    for e, c in enumerate(clusters):
        within = second[:, cluster == c].softmax(-1)[:, (cluster[:e] == c).sum()]
        torch.testing.assert_close(
            (scores - (x @ u.t() + b).logsumexp(-1, keepdim=True))[:, e].exp(), first[:, c] * within
        )
    torch.testing.assert_close(joint_scores(x, u, b, v, a + draw(4)[cluster], cluster), scores)
