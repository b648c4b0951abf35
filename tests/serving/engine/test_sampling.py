"""Choosing tokens, against the plainest computation of the same, and text that stops where it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raymoe.serving.engine.sampling import (
    CANDIDATES,
    Draw,
    Sampling,
    change,
    choose,
    eligible,
    logprobs,
    noise,
    penalize,
    pick,
)
from tests.support.served import tokenizer

TOKENIZER = tokenizer()
GREEDY = Sampling(temperature=0)


def random_logits(rows: int, vocabulary: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def plain_weights(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, min_p, top_k, top_p on one row, token by token: probabilities."""
    p = (logits.double() / sampling.temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda t: -p[t])
    order = [t for t in order if p[t] >= sampling.min_p * p[order[0]]]
    order = order[: sampling.top_k or len(order)]
    mass, kept, so_far = sum(p[t] for t in order), [], 0.0
    for t in order:
        if so_far < sampling.top_p * mass:
            kept.append(t)
        so_far += p[t]
    out = torch.zeros(len(p), dtype=torch.float64)
    out[kept] = torch.tensor([p[t] for t in kept], dtype=torch.float64)
    return out / out.sum()


@pytest.mark.parametrize("vocabulary", [11, 3 * CANDIDATES])
@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_eligible_tokens_are_those_of_the_plain_definition(vocabulary: int, scale: float) -> None:
    samplings = [
        Sampling(temperature=t, top_k=k, top_p=p, min_p=m)
        for t in (0.5, 1.7)
        for k in (0, 1, 7, 2 * CANDIDATES)
        for p in (1.0, 0.9, 0.3)
        for m in (0.0, 0.05)
    ]
    logits = random_logits(len(samplings), vocabulary, scale=scale)
    weights = eligible(logits, samplings)
    for row, one, sampling in zip(weights, logits, samplings, strict=True):
        torch.testing.assert_close(row.double() / row.sum(), plain_weights(one, sampling), rtol=1e-4, atol=1e-7)


def test_a_batch_chooses_what_each_row_would_alone() -> None:
    samplings = [Sampling(temperature=0), Sampling(seed=1), Sampling(top_p=0.5), Sampling(top_k=3, presence_penalty=2)]
    draws = [Draw(s, [1, 2, 3], [4, 5]) for s in samplings]
    logits = random_logits(4, 50)
    before = logits.clone()
    together = choose(logits, draws).tolist()
    assert together == [choose(logits[i : i + 1], [draws[i]]).item() for i in range(4)]
    assert together[0] == logits[0].argmax()
    assert torch.equal(logits, before)


def test_greedy_is_the_limit_of_temperature_and_of_cuts() -> None:
    logits = random_logits(3, 400)
    for sampling in (
        Sampling(temperature=0), Sampling(temperature=1e-4), Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(top_p=0),
    ):  # fmt: skip
        assert choose(logits, [Draw(sampling, [0], [])] * 3).tolist() == logits.argmax(-1).tolist()


def test_noise_is_even_and_without_memory_in_each_of_its_arguments() -> None:
    last = np.array([2**32 - 1])
    columns = torch.from_numpy(
        np.stack(
            [
                np.concatenate([noise(seed, 7, last) for seed in range(4000)]),
                np.concatenate([noise(2**64 - 1, position, last) for position in range(4000)]),
                noise(0, 0, np.arange(4000)),
            ]
        )
    )
    assert columns.min() > 0 and columns.max() < 1
    for column in columns.float():
        assert (column.histc(10, 0, 1) - 400).abs().max() < 80
        assert abs(torch.corrcoef(torch.stack((column[1:], column[:-1])))[0, 1]) < 0.06
    assert (torch.corrcoef(columns) - torch.eye(3)).abs().max() < 0.06


def test_tokens_are_drawn_in_proportion_to_their_weights() -> None:
    weights = np.array([0.0, 3.0, 1.0, 0.0, 4.0, 0.0])
    for draws in ([pick(weights, 7, i) for i in range(5000)], [pick(weights, i, 7) for i in range(5000)]):
        assert np.bincount(draws, minlength=6) / 5000 == pytest.approx(weights / 8, abs=0.02)
    assert not {0, 3, 5} & {*draws}


def test_a_token_that_is_only_just_eligible_changes_no_other_draw() -> None:
    weights, less = np.ones(50), np.ones(50)
    less[3] = 0
    pairs = [(pick(weights, 1, i), pick(less, 1, i)) for i in range(1000)]
    assert all(a == b for a, b in pairs if a != 3) and any(a == 3 for a, _ in pairs)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
    st.lists(st.integers(0, 9), max_size=8),
    st.floats(0.5, 2),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_penalties(prompt: list[int], answer: list[int], repetition: float, frequency: float, presence: float) -> None:
    logits = random_logits(1, 10)[0]
    expected = logits.tolist()
    for t in set(prompt + answer):
        expected[t] = expected[t] / repetition if expected[t] > 0 else expected[t] * repetition
    for t in set(answer):
        expected[t] -= presence + frequency * answer.count(t)
    sampling = Sampling(repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence)
    penalize(logits, Draw(sampling, prompt, answer))
    torch.testing.assert_close(logits, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_biases_are_added_and_a_banned_token_is_never_chosen() -> None:
    logits = random_logits(2, 300)
    best = logits.argmax(-1).tolist()
    biased = Sampling(temperature=0, logit_bias=((7, 100.0), (best[0], -1.0)))
    assert choose(logits, [Draw(biased, [0], []), Draw(GREEDY, [0], [])]).tolist() == [7, best[1]]
    wanted = logits[0].clone()
    wanted[7] += 2.5
    for seed in range(200):
        plain, other = Sampling(seed=seed), Sampling(seed=seed, logit_bias=((7, 2.5),))
        assert (
            choose(logits[:1], [Draw(other, [0], [])]).tolist() == choose(wanted[None], [Draw(plain, [0], [])]).tolist()
        )
    only = Sampling(temperature=0.01, logit_bias=((7, 100.0),))
    assert choose(logits[:1], [Draw(only, [0], [], banned=7)]).item() == best[0]
    assert choose(logits[:1], [Draw(GREEDY, [0], [], banned=best[0])]).item() == logits[0].topk(2).indices[1]


def test_a_bias_comes_after_penalties() -> None:
    sampling = Sampling(temperature=0, repetition_penalty=2, presence_penalty=1, logit_bias=((3, 5.0),))
    logits = random_logits(1, 10)[0]
    expected = logits.clone()
    penalize(expected, Draw(sampling, [3], [3]))
    expected[3] += 5
    change(logits, Draw(sampling, [3], [3]))
    torch.testing.assert_close(logits, expected)


def test_log_probabilities_are_of_the_token_and_of_the_best() -> None:
    logits = random_logits(2, 20)
    first, second = logprobs(logits, torch.tensor([3, 4]), [2, 0])
    table = logits.log_softmax(-1)
    assert (first.token, second.token) == (3, 4)
    assert first.logprob == pytest.approx(table[0, 3].item()) and second.logprob == pytest.approx(table[1, 4].item())
    assert [t for t, _ in first.top] == table[0].argsort(descending=True)[:2].tolist() and second.top == ()
    assert [p for _, p in first.top] == pytest.approx(table[0].sort(descending=True).values[:2].tolist())
    assert len(logprobs(logits, torch.tensor([3, 4]), [50, 1])[0].top) == 20


def test_bad_values_are_refused_by_name() -> None:
    bad = dict(temperature=-1, top_k=-1, top_p=-0.1, min_p=2, repetition_penalty=0, frequency_penalty=3, seed=-1)
    for name, value in [
        *bad.items(),
        ("stop", ("",)),
        ("temperature", float("nan")),
        *[("logit_bias", b) for b in (((1, 101.0),), ((-1, 0.0),), ((2, 1.0), (2, 1.0)), ((1, float("nan")),))],
    ]:
        with pytest.raises(ValueError, match=f"{name}="):
            Sampling(**{name: value})  # type: ignore[arg-type]


def test_top_p_of_zero_chooses_the_most_likely_token() -> None:
    logits = random_logits(8, 300)
    draws = [Draw(Sampling(temperature=1.5, top_p=0, seed=seed), [1], []) for seed in range(8)]
    assert choose(logits, draws).tolist() == logits.argmax(-1).tolist()


def test_padding_of_the_vocabulary_is_never_chosen_and_never_among_the_most_likely() -> None:
    logits = random_logits(6, 40)
    logits[:, 32:] += 100
    bias = ((3, 1.0),)
    draws = [Draw(Sampling(temperature=t, logit_bias=bias, seed=i), [1], []) for i, t in enumerate((0, 0, 1, 1, 2, 2))]
    assert choose(logits, draws, vocabulary=32).max() < 32
    found = logprobs(logits, torch.tensor([1] * 6), [5] * 6, vocabulary=32)
    assert all(token < 32 for entry in found for token, _ in entry.top)
    assert found[0].logprob == pytest.approx(logits[0].log_softmax(-1)[1].item())  # of the model, padding included


def test_golden_tokens() -> None:
    """The tokens that version 0.1 draws for a seed and position: a change would change every seeded completion."""
    logits = torch.linspace(-2, 2, 50).sin().repeat(4, 1)
    draws = [Draw(Sampling(temperature=0.9, top_k=k, seed=s), [0] * 5, [1] * n) for k, s, n in ((0, 0, 0), (0, 7, 3), (10, 7, 3), (0, 2**63, 100))]  # fmt: skip
    assert choose(logits, draws).tolist() == [12, 19, 43, 23]
