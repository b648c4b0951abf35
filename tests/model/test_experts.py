"""The fused layers equal plain loops over tokens and experts: forward and all gradients, float64, within 1e-10."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.config import ModelSection
from raymoe.model.dispatch import LocalDispatch
from raymoe.model.expert_math import ClusteredFFN, Pairs, bucket, spans
from raymoe.model.experts import ClusteredExperts, FlatExperts
from raymoe.model.observation import LayerObservation
from tests.support import plain


def fill(layer: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*layer.parameters(), *(b for name, b in layer.named_buffers() if "bias" in name)]:
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.5)


def same(actual: torch.Tensor, expected: torch.Tensor, what: str, bound: float = 1e-10) -> None:
    error = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert actual.shape == expected.shape and error <= bound, f"{what}: off by {error}"


def gradients(layer: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
    names, tensors = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad((y * probe).sum(), [x, *tensors], allow_unused=True)
    zero = [g if g is not None else torch.zeros_like(t) for g, t in zip(grads, [x, *tensors], strict=True)]
    return dict(zip(["x", *names], zero, strict=True))


@st.composite
def layers(draw: st.DrawFn) -> tuple[ClusteredExperts, torch.Tensor]:
    clusters = draw(st.integers(1, 4))
    k = draw(st.integers(1, 4))
    experts = draw(st.integers(max(clusters, k * clusters), 4 * max(clusters, k)))
    width = draw(st.sampled_from([0, 1, 3]))
    private = draw(st.booleans())
    kind = (
        {"expert_kind": "private", "expert_width": 3, "base_width": draw(st.sampled_from([None, 0, 5]))}
        if private
        else {}
    )
    model = ModelSection(
        layers=1, d_model=8, heads=2, kv_heads=1, d_expert=draw(st.sampled_from([4, 6])), n_experts=experts,
        n_clusters=clusters, experts_per_token=k, residual_width=width, **kind,
        gate=draw(st.sampled_from(["softmax", "biased", "sigmoid"])),
        clusters_per_token=draw(st.integers(1, clusters)), gate_scale=1.5,
    )  # fmt: skip
    # Any assignment: clusters of any size, some with fewer experts than K, some empty.
    assignment = draw(st.lists(st.integers(0, clusters - 1), min_size=experts, max_size=experts))
    layer = ClusteredExperts(model, assignment, LocalDispatch(clusters)).double()
    seed = draw(st.integers(0, 2**30))
    fill(layer, seed)
    tokens = draw(st.integers(0, 13))
    x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if draw(st.booleans()):  # all rows select few clusters; the others have no rows
        layer.router.bias[0] += 100
    return layer, x.requires_grad_()


@settings(max_examples=80, deadline=None)
@given(layers(), st.integers(0, 2**30))
def test_fused_layer_equals_plain_loop(case: tuple[ClusteredExperts, torch.Tensor], seed: int) -> None:
    layer, x = case
    cluster, experts = plain.clustered_selection(layer, x)
    fused, loop = layer(x), plain.clustered(layer, x, cluster, experts)
    same(fused, loop, "forward")
    if x.numel():
        expected = gradients(layer, x, loop, seed)
        for name, grad in gradients(layer, x, layer(x), seed).items():
            same(grad, expected[name], name)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(4, 7), st.integers(1, 12), st.integers(0, 2**30))
def test_flat_layer_equals_plain_loop(k: int, experts: int, tokens: int, seed: int) -> None:
    model = ModelSection(
        experts="flat", layers=1, d_model=8, heads=2, kv_heads=1, d_expert=6, n_experts=experts, experts_per_token=k
    )
    layer = FlatExperts(model, LocalDispatch(experts)).double()
    fill(layer, seed)
    x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)
    loop = plain.flat(layer, x)
    same(layer(x), loop, "forward")
    expected = gradients(layer, x, loop, seed)
    for name, grad in gradients(layer, x, layer(x), seed).items():
        same(grad, expected[name], name)


def tiny(width: int, **changes: int) -> ModelSection:
    sizes = dict(layers=1, d_model=8, heads=2, kv_heads=1, d_expert=6, n_experts=6, n_clusters=2, experts_per_token=2)
    return ModelSection(**(sizes | {"residual_width": width} | changes))  # type: ignore[arg-type]


def test_full_width_residuals_reproduce_flat_experts() -> None:
    """With W = D and the base subtracted, the experts of a cluster can be any experts."""
    model = tiny(8, n_clusters=1)
    layer = ClusteredExperts(model, [0] * 6, LocalDispatch(1)).double()
    fill(layer, 0)
    other = FlatExperts(
        ModelSection(experts="flat", layers=1, d_model=8, heads=2, kv_heads=1, d_expert=6, n_experts=6, experts_per_token=2),
        LocalDispatch(6),
    ).double()  # fmt: skip
    fill(other, 1)
    with torch.no_grad():
        eye = torch.eye(8, dtype=torch.float64)
        for name in ("gate", "up"):
            getattr(layer, f"{name}_in")[:] = eye
            getattr(layer, f"{name}_out")[:] = getattr(other, name) - getattr(layer, f"base_{name}")
        layer.down_in[:] = other.down - layer.base_down
        layer.down_out[:] = eye
        layer.expert_router[:] = other.router.weight
        layer.expert_bias[:] = other.router.bias
    x = torch.randn(11, 8, dtype=torch.float64)
    same(layer(x), other(x), "full width")


@pytest.mark.parametrize("width", [0, 3])
def test_bfloat16_autocast_is_close_to_float32(width: int) -> None:
    torch.manual_seed(0)
    layer = ClusteredExperts(tiny(width, d_model=64, d_expert=64), [0, 0, 0, 1, 1, 1], LocalDispatch(2))
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(53, 64).bfloat16().float().requires_grad_()
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = layer(x)
    assert rough.dtype == torch.float32  # the gate and the sum over choices are float32
    assert (rough - exact).norm() <= 0.02 * exact.norm()
    a, b = gradients(layer, x, exact, 0), gradients(layer, x, rough, 0)
    for name in a:
        assert b[name].dtype == torch.float32
        assert (a[name] - b[name]).norm() <= 0.03 * a[name].norm() + 1e-6, name


def test_load_counts_every_choice_once() -> None:
    layer = ClusteredExperts(tiny(3, clusters_per_token=2), [0, 1, 1, 0, 1, 1], LocalDispatch(2)).double()
    fill(layer, 3)
    seen = LayerObservation()
    layer(torch.randn(9, 8, dtype=torch.float64), seen)
    assert seen.cluster_load_C is not None and seen.member_load_M is not None
    assert seen.cluster_load_C.tolist() == [9, 9]
    assert seen.member_load_M.sum() == 9 * 2 * 2 and seen.computed_rows == 18
    assert seen.member_load_M[[0, 3]].tolist() == [9, 9]  # a cluster of two experts uses both for each row


def test_pairs_are_sorted_by_expert_and_padded_where_shapes_are_compiled() -> None:
    expert = torch.tensor([[2, 0], [1, 2], [0, 1]])
    for x, sizes in ((torch.zeros(3, 4), [2, 2, 2, 0]), (torch.zeros(3, 4, dtype=torch.bfloat16), [8, 8, 8, 0])):
        pairs = Pairs(expert, 4, x)
        assert pairs.counts == [2, 2, 2, 0]
        assert pairs.parts == spans(sizes)
        for row in range(3):
            for slot in range(2):
                at = int(pairs.position_RK[row, slot])
                start, stop = pairs.parts[expert[row, slot]]
                assert start <= at < stop and pairs.row_N[at] == row
        weight = torch.arange(1.0, 7).view(3, 2)
        assert pairs.spread(weight).sum() == weight.sum() and pairs.spread(weight)[pairs.position_RK[1, 1]] == 4


def test_buckets_are_few_and_add_little_padding() -> None:
    x = torch.zeros(1, dtype=torch.bfloat16)
    sizes = {bucket(n, x) for n in range(1, 4097)}
    assert len(sizes) < 80 and all(n <= bucket(n, x) <= max(8, n * 1.13 + 8) for n in range(1, 4097))
    assert bucket(77, torch.zeros(1)) == 77


def test_gates_of_bfloat16_rows_have_gradients_summed_in_float32() -> None:
    """The gradient of a gate sums over D and W in float32: only the products are rounded to bfloat16."""
    torch.manual_seed(0)
    d, f, w, rows = 256, 512, 8, 24
    x_RD = torch.randn(rows, d)
    gate_RK = torch.rand(rows, 2, requires_grad=True)
    expert_RK = torch.stack([torch.randperm(4)[:2] for _ in range(rows)])
    shapes = [(1, d, f), (1, d, f), (1, f, d), (4, d, w), (4, w, f), (4, d, w), (4, w, f), (4, f, w), (4, w, d)]
    weights = [torch.randn(shape) * shape[1] ** -0.5 for shape in shapes]
    dy_RD = torch.randn(rows, d)

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        # The same bfloat16 values in both types.
        x, values = x_RD.bfloat16().to(dtype), [weight.bfloat16().to(dtype) for weight in weights]
        y = ClusteredFFN.apply(x, [(0, rows)], [Pairs(expert_RK, 4, x)], [(0, 4)], gate_RK, *values)
        (grad_RK,) = torch.autograd.grad(y, gate_RK, dy_RD.bfloat16().to(dtype))
        assert grad_RK.dtype == torch.float32
        return grad_RK

    exact, rough = gradient(torch.float64), gradient(torch.bfloat16)
    assert (rough - exact).norm() < 0.01 * exact.norm()
    assert (rough != rough.bfloat16()).float().mean() > 0.9  # not rounded to bfloat16
