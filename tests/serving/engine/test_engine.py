"""The engine against the model that evaluation uses: equal logits and text, regardless of other requests."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raymoe.model.transformer import Transformer
from raymoe.serving.engine.cluster import LocalClusters, Product, few_sizes
from raymoe.serving.engine.engine import Engine, EngineSettings, QueueFull
from raymoe.serving.engine.kv_cache import KVCache
from raymoe.serving.engine.request import Increment, Request
from raymoe.serving.engine.sampling import Sampling
from raymoe.serving.engine.trunk import Batch, Segment, Trunk
from raymoe.storage.artifact import Artifact
from tests.support import served

TOKENIZER = served.tokenizer()
GREEDY = Sampling(temperature=0)
ALL = range(served.MODEL.n_clusters)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return served.artifact(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def model(artifact: Artifact) -> Transformer:
    return served.whole(artifact)


def make_trunk(artifact: Artifact, dtype: torch.dtype = torch.float32) -> Trunk:
    return Trunk(artifact, LocalClusters(artifact, range(artifact.model.n_clusters), dtype), dtype, 128)


@pytest.fixture(scope="module")
def trunk(artifact: Artifact) -> Trunk:
    return make_trunk(artifact)


def make_engine(trunk: Trunk, **changes: int) -> Engine:
    standard = dict(kv_bytes=1 << 20, block=4, max_running=4, max_queued=100, step_tokens=12)
    return Engine(trunk, TOKENIZER, EngineSettings(**(standard | changes)))


def random_tokens(n: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(320, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def expected(model: Transformer, tokens: Iterable[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(tokens)]))[0]


class Answer:
    """What a request's increments add up to."""

    def __init__(self) -> None:
        self.increments: list[Increment] = []

    @property
    def tokens(self) -> list[int]:
        return [i.token for i in self.increments if i.token is not None]

    @property
    def text(self) -> str:
        return "".join(i.text for i in self.increments)

    @property
    def finish(self) -> str | None:
        return self.increments[-1].finish if self.increments else None


def drain(engine: Engine, answers: dict[Hashable, Answer] | None = None) -> dict[Hashable, Answer]:
    answers = {} if answers is None else answers
    while not engine.idle:
        for increment in engine.step():
            answers.setdefault(increment.key, Answer()).increments.append(increment)
    return answers


KEYS = count()


def submit(engine: Engine, request: Request) -> int:
    """Submit a request under a new key; return the key."""
    key = next(KEYS)
    engine.submit(key, request)
    return key


def ask(engine: Engine, request: Request) -> Answer:
    number = submit(engine, request)
    return drain(engine)[number]


# Logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


PRIVATE = {"expert_kind": "private", "expert_width": 20}
MODELS = [
    {}, {"residual_width": 0}, {"tied_head": False, "clusters_per_token": 2, "gate_scale": 1.5},
    {"experts_per_token": 1}, {"kv_heads": 4}, PRIVATE, PRIVATE | {"experts_per_token": 1},
    PRIVATE | {"base_width": 24, "gate": "sigmoid", "clusters_per_token": 2}, PRIVATE | {"gate": "biased"},
    {"gate": "sigmoid"}, {"gate": "biased", "clusters_per_token": 2},
]  # fmt: skip


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("changes", MODELS)
def test_logits_are_those_of_evaluation(tmp_path, monkeypatch, changes: dict, compiled: bool) -> None:
    monkeypatch.setenv("RAYMOE_NATIVE", str(int(compiled)))
    artifact = served.artifact(tmp_path, replace(served.MODEL, **changes))
    model, trunk = served.whole(artifact), make_trunk(artifact)
    cache = KVCache(artifact.model, 1 << 20, torch.float32, 4)
    tokens = random_tokens(100)
    reference = expected(model, tokens)
    cache.allocate("whole", 100)
    close(trunk([Segment("whole", 0, tokens)], cache, torch.arange(100)), reference)
    cache.allocate("chunks", 100)
    at = 0
    for n in (1, 7, 1, 1, 40, 3, 47):
        close(trunk([Segment("chunks", at, tokens[at : at + n])], cache, torch.arange(n)), reference[at : at + n])
        at += n


def test_a_cluster_without_members_is_no_trouble(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "UNEVEN", [[0, 2, 2, 0, 2, 0, 2], [1] * 7])
    artifact = served.artifact(tmp_path)
    trunk, tokens = make_trunk(artifact), random_tokens(50)
    cache = KVCache(artifact.model, 1 << 20, torch.float32)
    cache.allocate(0, 50)
    close(trunk([Segment(0, 0, tokens)], cache, torch.arange(50)), expected(served.whole(artifact), tokens))


def test_bfloat16_is_as_near_as_evaluation_in_bfloat16(artifact: Artifact, model: Transformer) -> None:
    trunk, tokens = make_trunk(artifact, torch.bfloat16), random_tokens(100)
    cache = KVCache(artifact.model, 1 << 20, torch.bfloat16)
    cache.allocate(0, 100)
    logits = trunk([Segment(0, 0, tokens)], cache, torch.arange(100))
    reference = expected(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = expected(model, tokens).float()
    error, allowed = (logits - reference).norm(dim=1), (rounded - reference).norm(dim=1)
    assert error.median() < 1.5 * allowed.median() and error.mean() < 1.5 * allowed.mean()


def test_what_cannot_be_served_is_refused(tmp_path, artifact: Artifact) -> None:
    for kind in ("flat", "dense"):
        other = served.artifact(tmp_path / kind, replace(served.MODEL, experts=kind))
        with pytest.raises(ValueError, match=f"experts='{kind}'"):
            Trunk(other, lambda layer, rows: rows, torch.float32, 128)
    with pytest.raises(ValueError, match="float16"):
        Trunk(artifact, lambda layer, rows: rows, torch.float16, 128)


def test_one_call_for_all_active_clusters_of_a_layer(artifact: Artifact, trunk: Trunk) -> None:
    calls: list[tuple[int, dict[int, int]]] = []
    local = LocalClusters(artifact, ALL, torch.float32)

    def compute(layer: int, rows):
        calls.append((layer, {c: len(part) for c, part in rows.items()}))
        return local(layer, rows)

    engine = make_engine(Trunk(artifact, compute, torch.float32, 128), step_tokens=20)
    for i in range(3):
        submit(engine, Request(random_tokens(5, i), 4))
    engine.step()
    assert [layer for layer, _ in calls] == [0, 1]
    assert all(sum(rows.values()) == 15 and min(rows.values()) > 0 for _, rows in calls)


def test_a_token_is_computed_bit_for_bit_alike_in_any_company(trunk: Trunk) -> None:
    """What makes a resumed request exact: chunks, neighbours and blocks do not even round differently."""
    cache = KVCache(trunk.model, 1 << 20, torch.float32, 4)
    tokens, generator = random_tokens(100), torch.Generator().manual_seed(0)
    cache.allocate("alone", 100)
    alone = trunk([Segment("alone", 0, tokens)], cache, torch.arange(100))
    cache.allocate("other", 100)
    cache.allocate("one", 100)
    at = other = 0
    while at < 100:
        n, m = (int(torch.randint(1, most, (1,), generator=generator)) for most in (9, 4))
        segments = [Segment("other", other, tokens[:m]), Segment("one", at, tokens[at : at + n])]
        logits = trunk(segments, cache, torch.arange(m, m + min(n, 100 - at)))
        assert torch.equal(logits, alone[at : at + n])
        at, other = at + n, other + m


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_request_among_short_ones_changes_no_bit(artifact: Artifact, dtype: torch.dtype) -> None:
    trunk = make_trunk(artifact, dtype)
    cache = KVCache(trunk.model, 1 << 20, dtype, 4)
    lengths = [120, 9, 8, 100, 7, 20, 3]
    for i, length in enumerate(lengths):
        cache.allocate(i, length)
        trunk([Segment(i, 0, random_tokens(length - 1, i))], cache, torch.arange(0))
    last = [Segment(i, length - 1, (i,)) for i, length in enumerate(lengths)]
    alone = torch.cat([trunk([segment], cache, torch.arange(1)) for segment in last])
    for members, groups in ((range(7), 2), ([0, 1, 2], 2), ([1, 0, 3], 1)):  # it pays to attend apart, or not
        some = [last[i] for i in members]
        assert len(Batch(some, cache, 2, dtype).groups) == groups
        assert torch.equal(trunk(some, cache, torch.arange(len(some))), alone[list(members)])


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_alone_is_computed_as_among_others(
    monkeypatch: pytest.MonkeyPatch, packs: bool, dtype: torch.dtype
) -> None:
    if not packs:
        monkeypatch.setattr(Product, "packs", staticmethod(lambda dtype: False))
    weight, rows = torch.randn(32, 48).to(dtype), torch.randn(40, 32).to(dtype)
    product = Product(weight)
    together = product(rows)
    torch.testing.assert_close(together, rows @ weight, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)
    for i in range(40):
        assert torch.equal(product(rows[i : i + 1])[0], together[i])


def test_products_have_few_sizes() -> None:
    assert [few_sizes(n) for n in (1, 4, 5, 6, 7, 9, 12, 13, 17, 24, 25, 100)] == [4, 4, 6, 6, 8, 12, 12, 16, 24, 24, 32, 128]  # fmt: skip


# Schedules

REQUESTS = st.builds(
    lambda n, seed, tokens, t, echo: Request(
        random_tokens(n, seed), tokens, Sampling(temperature=t, seed=seed), logprobs=320, echo=echo
    ),
    st.integers(1, 40),
    st.integers(0, 1000),
    st.integers(1, 10),
    st.sampled_from([0.0, 0.9]),
    st.booleans(),
)
JOINS = st.lists(st.tuples(REQUESTS, st.integers(0, 12), st.none() | st.integers(1, 8)), min_size=1, max_size=6)
"""(request, steps before it joins, steps until it is cancelled)."""


@settings(max_examples=60, deadline=None)
@given(joins=JOINS, step_tokens=st.integers(3, 30))
def test_completions_equal_those_of_the_whole_model_as_requests_join_and_leave(
    trunk: Trunk, model: Transformer, joins: list[tuple[Request, int, int | None]], step_tokens: int
) -> None:
    engine = make_engine(trunk, max_running=3, step_tokens=step_tokens, kv_bytes=100 * 256)
    answers: dict[Hashable, Answer] = {}
    requests: dict[int, Request] = {}
    cancels: dict[int, list[int]] = {}
    last = max(joined + (cancelled or 0) for _, joined, cancelled in joins)
    for step in range(last + 1):
        for request, joined, cancelled in joins:
            if joined == step:
                number = submit(engine, request)
                requests[number] = request
                if cancelled:
                    cancels.setdefault(step + cancelled, []).append(number)
        for number in cancels.get(step, []):
            increment = engine.cancel(number)
            if increment is None:
                assert answers[number].finish in ("stop", "length")
                continue
            answers.setdefault(number, Answer()).increments.append(increment)
            assert increment.finish == "abort" and engine.cancel(number) is None
        for increment in engine.step():
            answers.setdefault(increment.key, Answer()).increments.append(increment)
    drain(engine, answers)
    assert engine.cache.free == engine.cache.capacity
    assert answers.keys() == requests.keys()
    for number, request in requests.items():
        check(model, request, answers[number])


def check(model: Transformer, request: Request, answer: Answer) -> None:
    """Every log-probability is the whole model's, the tokens are those chosen from them, and the text is theirs."""
    tokens = [*request.prompt, *answer.tokens]
    table = expected(model, tokens).log_softmax(-1)
    for i, increment in enumerate(i for i in answer.increments if i.token is not None):
        at = len(request.prompt) + i
        assert increment.logprob is not None
        found = dict(increment.logprob.top)
        close(torch.tensor([found[t] for t in range(320)]), table[at - 1])
        best = table[at - 1].topk(2).values
        if request.sampling == replace(GREEDY, seed=request.sampling.seed) and best[0] - best[1] > 1e-3:
            assert increment.token == table[at - 1].argmax()
        assert (increment.usage.prompt_tokens, increment.usage.completion_tokens) == (len(request.prompt), i + 1)
        assert (increment.echo is not None) == (request.echo and i == 0)
        if increment.echo:
            assert increment.echo.text == TOKENIZER.decode(list(request.prompt), skip_special_tokens=False)
            first, *rest = increment.echo.logprobs or ()
            assert first is None and [p.token for p in rest if p] == list(request.prompt[1:])
            close(
                torch.tensor([p.logprob for p in rest if p]),
                table[torch.arange(len(rest)), list(request.prompt[1:])],
            )
    if answer.finish != "abort":
        assert (answer.finish == "length") == (len(answer.tokens) == request.max_tokens and answer.tokens[-1] != 0)
        visible = [t for t in answer.tokens if t != 0]
        whole = TOKENIZER.decode([*request.prompt, *visible], skip_special_tokens=False)
        assert whole.endswith(answer.text)


def test_a_long_prompt_delays_no_request(trunk: Trunk) -> None:
    engine = make_engine(trunk, step_tokens=8)
    talking = submit(engine, Request(random_tokens(3), 30, GREEDY, ignore_eos=True))
    engine.step()
    long = submit(engine, Request(random_tokens(80, 1), 2, GREEDY, ignore_eos=True))
    short = submit(engine, Request(random_tokens(6, 2), 2, GREEDY, ignore_eos=True))
    seen = [[i.key for i in engine.step()] for _ in range(20)]
    assert all(talking in step for step in seen)
    assert next(i for i, step in enumerate(seen) if short in step) == 1  # 3 or 4 tokens of 6 a step
    assert next(i for i, step in enumerate(seen) if long in step) >= 10


def test_greedy_answers_alone_and_among_others(trunk: Trunk) -> None:
    requests = [Request(random_tokens(5 + 7 * i, i), 20, GREEDY, ignore_eos=True) for i in range(6)]
    alone = [ask(make_engine(trunk), request).tokens for request in requests]
    engine = make_engine(trunk)
    numbers = [submit(engine, request) for request in requests]
    together = drain(engine)
    assert [together[n].tokens for n in numbers] == alone


# Ends


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(trunk: Trunk) -> None:
    engine = make_engine(trunk, max_running=1, max_queued=1)
    first, second = (submit(engine, Request(random_tokens(3), 5, GREEDY)) for _ in range(2))
    with pytest.raises(QueueFull, match="1 requests are running and 1 are waiting"):
        submit(engine, Request(random_tokens(3), 5, GREEDY))
    assert engine.cancel(second) is not None
    third = submit(engine, Request(random_tokens(3), 5, GREEDY))
    assert {*drain(engine)} == {first, third}
    none_waits = make_engine(trunk, max_running=1, max_queued=0)
    submit(none_waits, Request(random_tokens(3), 5))
    with pytest.raises(QueueFull):
        submit(none_waits, Request(random_tokens(3), 5))


def test_requests_wait_for_blocks_in_their_order(trunk: Trunk) -> None:
    engine = make_engine(trunk, kv_bytes=10 * 4 * 256)  # 40 tokens
    assert engine.cache.capacity == 40
    first = submit(engine, Request(random_tokens(10), 20, GREEDY, ignore_eos=True))
    submit(engine, Request(random_tokens(10), 10, GREEDY, ignore_eos=True))
    submit(engine, Request(random_tokens(2), 2, GREEDY, ignore_eos=True))
    assert (engine.running, engine.waiting) == (1, 2)
    assert engine.cancel(first) is not None
    assert (engine.running, engine.waiting) == (2, 0)
    drain(engine)
    assert engine.cache.free == 40


def test_cancelling_frees_the_blocks_at_once(trunk: Trunk) -> None:
    engine = make_engine(trunk)
    number = submit(engine, Request(random_tokens(10), 22))
    assert engine.cache.free == engine.cache.capacity - 32
    engine.step()
    aborted = engine.cancel(number)
    assert aborted and aborted.finish == "abort" and aborted.usage.completion_tokens == 1
    assert engine.idle and engine.cache.free == engine.cache.capacity
    assert engine.cancel(number) is None


def test_a_key_belongs_to_one_active_request(trunk: Trunk) -> None:
    engine = make_engine(trunk, max_running=1)
    for key in (("api", 1), ("api", 2)):
        engine.submit(key, Request(random_tokens(3), 5, GREEDY))
        with pytest.raises(ValueError, match="is active"):
            engine.submit(key, Request(random_tokens(3), 5, GREEDY))
    assert engine.keys == [("api", 1), ("api", 2)]
    assert {*drain(engine)} == {("api", 1), ("api", 2)} and engine.keys == []
    engine.submit(("api", 1), Request(random_tokens(3), 5, GREEDY))


def test_what_can_never_be_served_is_refused(trunk: Trunk) -> None:
    engine = make_engine(trunk)
    for request, what in [
        (Request(()), "the prompt is empty"),
        (Request((1, 320)), "token 320 is not in the vocabulary of 320"),
        (Request((-1,)), "token -1"),
        (Request((1,), -1), "max_tokens=-1"),
        (Request((1,) * 100, 29), "make 129: at most 128"),
        (Request((1,), 2, resumed=(1, 2)), "leaves nothing to add"),
        (Request((1,), logprobs=-1), "logprobs=-1"),
        (Request((1,), 2, min_tokens=3), "min_tokens=3 is not allowed: 0 to max_tokens=2"),
        (Request((1,), 2, min_tokens=-1), "min_tokens=-1"),
        (Request((1,), stop_token_ids=(320,)), "token 320 is not in the vocabulary"),
        (Request((1,), sampling=Sampling(logit_bias=((320, 1.0),))), "token 320 is not in the vocabulary"),
    ]:
        with pytest.raises(ValueError, match=what):
            submit(engine, request)
    assert engine.idle and engine.step() == []
    with pytest.raises(ValueError, match="step_tokens=3"):
        EngineSettings(max_running=4, step_tokens=3)


def test_a_step_that_failed_can_be_tried_again(artifact: Artifact, trunk: Trunk) -> None:
    local, failures = LocalClusters(artifact, ALL, torch.float32), iter([False, True, False, False, False, True])

    def unreliable(layer: int, rows):
        if next(failures, False):
            raise ConnectionError("the cluster is gone")
        return local(layer, rows)

    engine = make_engine(Trunk(artifact, unreliable, torch.float32, 128), step_tokens=5)
    request = Request(random_tokens(12), 8, Sampling(seed=3), logprobs=0, echo=True)
    number, increments = submit(engine, request), []
    while not engine.idle:
        try:
            increments += engine.step()
        except ConnectionError:
            continue
    assert next(failures, None) is None
    assert increments == [replace(i, key=number) for i in ask(make_engine(trunk), request).increments]


def test_only_reading_a_prompt(trunk: Trunk, model: Transformer) -> None:
    prompt = random_tokens(30)
    (only,) = ask(make_engine(trunk), Request(prompt, 0, logprobs=0, echo=True)).increments
    assert (only.token, only.text, only.finish, only.usage.completion_tokens) == (None, "", "length", 0)
    table = expected(model, prompt).log_softmax(-1)
    assert only.echo and only.echo.logprobs
    close(torch.tensor([p.logprob for p in only.echo.logprobs if p]), table[torch.arange(29), list(prompt[1:])])


def end_soon(engine: Engine) -> Request:
    """A request whose answer ends by itself after some tokens."""
    for seed in range(200):
        request = Request(random_tokens(4, seed), 60, Sampling(temperature=3, seed=seed))
        if 3 < len(ask(engine, request).tokens) < 60:
            return request
    raise AssertionError("no answer ended")


def test_end_of_text_stops_unless_it_is_ignored(trunk: Trunk) -> None:
    engine = make_engine(trunk)
    request = end_soon(engine)
    answer = ask(engine, request)
    assert answer.finish == "stop" and answer.tokens[-1] == engine.end and "<|endoftext|>" not in answer.text
    on = ask(engine, replace(request, ignore_eos=True))
    assert on.finish == "length" and on.tokens[: len(answer.tokens)] == answer.tokens and len(on.tokens) == 60


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 50), data=st.data())
def test_stop_strings(trunk: Trunk, seed: int, data: st.DataObject) -> None:
    engine = make_engine(trunk)
    request = Request(random_tokens(4, seed), 25, Sampling(temperature=1.5, seed=seed), ignore_eos=True)
    free = ask(engine, request)
    start = data.draw(st.integers(0, max(0, len(free.text) - 1)))
    stops = (free.text[start : start + data.draw(st.integers(1, 6))] or "x", "never\0there")
    stopped = ask(engine, replace(request, sampling=replace(request.sampling, stop=stops)))
    at = free.text.find(stops[0])
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]
    assert stopped.text == (free.text[:at] if at >= 0 else free.text)
    assert stopped.finish == ("stop" if at >= 0 else "length")


def test_stop_tokens_end_the_answer_and_are_not_of_its_text(trunk: Trunk) -> None:
    engine = make_engine(trunk)
    request = Request(random_tokens(4), 25, Sampling(temperature=1.5, seed=1), ignore_eos=True)
    free = ask(engine, request)
    stop = next(t for t in free.tokens[5:] if t not in free.tokens[:5] and t != engine.end)
    at = free.tokens.index(stop)
    stopped = ask(engine, replace(request, stop_token_ids=(319 if stop != 319 else 318, stop)))
    assert stopped.tokens == free.tokens[: at + 1] and stopped.finish == "stop"
    whole = TOKENIZER.decode([*request.prompt, *free.tokens[:at]], skip_special_tokens=False)
    assert whole.endswith(stopped.text) and free.text.startswith(stopped.text.rstrip("\ufffd"))
    # Even at the last token, and as end-of-text that is otherwise ignored.
    last = ask(engine, replace(request, max_tokens=at + 1, stop_token_ids=(stop,)))
    assert last.finish == "stop" and last.text == stopped.text
    biased = replace(request, sampling=Sampling(temperature=0, logit_bias=((engine.end, 100.0),)))
    assert len(ask(engine, biased).tokens) == 25
    assert ask(engine, replace(biased, stop_token_ids=(engine.end,))).tokens == [engine.end]


def test_nothing_ends_an_answer_before_its_least_number_of_tokens(trunk: Trunk) -> None:
    engine = make_engine(trunk)
    bias = Sampling(temperature=0, logit_bias=((engine.end, 100.0), (40, 90.0)))
    answer = ask(engine, Request((1,), 20, bias, min_tokens=7))
    assert answer.tokens == [40] * 7 + [engine.end] and answer.finish == "stop"
    assert answer.text == TOKENIZER.decode([40] * 7)
    only = replace(bias, logit_bias=((40, 90.0),))
    stopped = ask(engine, Request((1,), 20, only, stop_token_ids=(40,), min_tokens=7))
    assert stopped.tokens == [40] * 8 and stopped.finish == "stop" and stopped.text == TOKENIZER.decode([40] * 7)
    completion = ask(engine, Request((1,), 20, replace(only, stop=(TOKENIZER.decode([40]),)), min_tokens=7))
    assert (
        completion.tokens == [40] * 8 and completion.finish == "stop" and completion.text == TOKENIZER.decode([40] * 7)
    )
    ignored = ask(engine, Request((1,), 9, bias, min_tokens=7, ignore_eos=True))
    assert ignored.tokens == [engine.end] * 9 and ignored.finish == "length"
    exact = ask(engine, Request((1,), 7, bias, min_tokens=7))
    assert exact.tokens == [40] * 7 and exact.finish == "length" and exact.text == TOKENIZER.decode([40] * 7)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), at=st.integers(1, 19))
def test_a_request_continues_elsewhere_with_the_same_text(trunk: Trunk, seed: int, at: int) -> None:
    sampling = Sampling(
        temperature=1.2, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.3, seed=seed,
        stop=("zz", "e t", "a"), logit_bias=((5, -100.0), (0, 6.0), (60, 2.0)),
    )  # fmt: skip
    request = Request(random_tokens(6, seed), 20, sampling, stop_token_ids=(30, 60), min_tokens=seed % 12)
    undisturbed = ask(make_engine(trunk), request)
    before = undisturbed.increments[:at]
    if len(before) < at or before[-1].finish:
        return
    elsewhere = make_engine(trunk, block=8, step_tokens=5)
    submit(elsewhere, Request(random_tokens(30, 1), 30))  # and it is not alone there
    number = submit(elsewhere, replace(request, resumed=tuple(undisturbed.tokens[:at])))
    after = drain(elsewhere)[number]
    assert after.tokens == undisturbed.tokens[at:]
    assert "".join(i.text for i in before) + after.text == undisturbed.text
    assert after.finish == undisturbed.finish
    assert after.increments[-1].usage == undisturbed.increments[-1].usage


def test_ids_that_pad_the_vocabulary_are_never_sampled_and_refused_in_requests(tmp_path: Path) -> None:
    """The embedding has 352 rows and the tokenizer 320 ids; without the limit one token in eleven would have no text."""
    engine = make_engine(make_trunk(served.artifact(tmp_path, replace(served.MODEL, vocabulary=352))))
    assert engine.vocabulary == 320
    for sampling in (GREEDY, Sampling(temperature=5.0, seed=1), Sampling(temperature=5.0, top_k=200, seed=2)):
        found = ask(engine, Request((1, 2, 3), 60, sampling, ignore_eos=True, logprobs=20))
        assert len(found.tokens) == 60 and max(found.tokens) < 320
        top = [token for i in found.increments if i.logprob for token, _ in i.logprob.top]
        assert top and max(top) < 320
    for bad in (Request((1, 320)), Request((1,), stop_token_ids=(351,))):
        with pytest.raises(ValueError, match="is not in the vocabulary of 320"):
            engine.submit("bad", bad)
