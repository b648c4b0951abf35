"""The chunked head equals torch's cross-entropy."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.model.loss import CHUNK, linear_cross_entropy


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]), st.integers(0, 2**30))
def test_chunked_loss_and_gradients_equal_torch(tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(11, (tokens,), generator=generator)
    ours = linear_cross_entropy(hidden, weight, target) * 0.3
    plain = F.cross_entropy(hidden @ weight.t(), target, reduction="sum") * 0.3
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_bfloat16_products_keep_a_float32_softmax() -> None:
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(40, 32), torch.randn(100, 32, requires_grad=True), torch.randint(100, (40,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, target)
    assert loss.dtype == torch.float32
    exact = F.cross_entropy(hidden @ weight.t(), target, reduction="sum")
    assert abs(loss - exact) / exact < 5e-3


def test_the_softmax_of_bfloat16_products_is_float32() -> None:
    """On the same bfloat16 logits the loss equals the float64 loss to float32 rounding; a bfloat16 softmax does not."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(64, 32, generator=generator).bfloat16().float()
    weight_VD = torch.randn(300, 32, generator=generator).bfloat16().float()
    target_T = torch.randint(300, (64,), generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden_TD, weight_VD, target_T)
    logits_TV = (hidden_TD.bfloat16() @ weight_VD.bfloat16().t()).double()
    exact = F.cross_entropy(logits_TV, target_T, reduction="sum")
    assert abs(loss.double() - exact) / exact < 1e-6
    rough = F.cross_entropy(logits_TV.bfloat16(), target_T, reduction="none").double().sum()
    assert abs(rough - exact) / exact > 1e-5
