"""Conversations: which tokens count as targets, and that they survive preparation, packing and batches."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.config import Config, override, preset
from raymoe.data.chat import CHAT_TEMPLATE, ChatTemplate, read_messages
from raymoe.data.corpus import Corpus
from raymoe.data.document import END_OF_TEXT, Piece
from raymoe.data.prepare import prepare, read_text
from raymoe.data.sources import check_source, skipped

CONTEXT = 16
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def conversation(i: int, turns: int = 1) -> list[dict[str, str]]:
    """Questions in lower case, answers in upper case with the number of the conversation."""
    return [
        message
        for t in range(turns)
        for message in (turn("user", f"what is it number {i} {t}"), turn("assistant", f"THE ANSWER {i} IS {t}"))
    ]


def write(path: Path, conversations: list[Any], **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"messages": messages, **more}) + "\n" for messages in conversations))
    return path


def config(path: object, cache: Path, *more: str) -> Config:
    small = ["model.vocabulary=300", f"model.context={CONTEXT}", "data.format=chat"]
    return override(preset("tiny"), [f"data.path={path}", f"data.cache={cache}", *small, *more])


def prepared(path: object, cache: Path, *more: str) -> Corpus:
    return Corpus.open(prepare(config(path, cache, *more), progress=False))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("chat")
    write(folder / "short.jsonl", [conversation(i) for i in range(120)])
    write(folder / "long.jsonl", [conversation(i, turns=3) for i in range(1000, 1060)])
    return prepared(folder, tmp_path_factory.mktemp("cache"))


# Templates


def test_the_default_template_ends_each_answer_with_end_of_text() -> None:
    messages = [turn("system", "Be brief."), *conversation(7, turns=2)]
    assert ChatTemplate(CHAT_TEMPLATE).pieces(messages) == (
        Piece("system: Be brief.\nuser: what is it number 7 0\nassistant:", False, False),
        Piece(" THE ANSWER 7 IS 0", True, True),
        Piece("user: what is it number 7 1\nassistant:", False, False),
        Piece(" THE ANSWER 7 IS 1", True, True),
    )


def test_a_prompt_in_training_is_the_prompt_of_a_request() -> None:
    template, messages = ChatTemplate(CHAT_TEMPLATE), conversation(1, turns=2)
    parts = template.render(messages[:3], add_generation_prompt=True)
    assert "".join(parts) == "".join(piece.text for piece in template.pieces(messages)[:3])


def test_a_template_without_end_of_text_gets_one_after_the_last_answer() -> None:
    pieces = ChatTemplate(CHATML).pieces(conversation(3, turns=2))
    assert [piece.counted for piece in pieces] == [False, True, False, True]
    assert pieces[1].text == "THE ANSWER 3 IS 0<|im_end|>\n" and [piece.end for piece in pieces] == [False] * 3 + [True]
    (*_, last) = ChatTemplate(CHATML).pieces([*conversation(3), turn("user", "thanks")])
    assert last == Piece("<|im_start|>user\nthanks<|im_end|>\n", True, False)


def test_text_after_the_end_of_an_answer_does_not_count() -> None:
    template = "{% for m in messages %}{{ m.role }}>{{ m.content }}" + END_OF_TEXT + "\n{% endfor %}{% if add_generation_prompt %}assistant>{% endif %}"  # fmt: skip
    assert ChatTemplate(template).pieces(conversation(1)) == (
        Piece("user>what is it number 1 0", True, False),
        Piece("\nassistant>", False, False),
        Piece("THE ANSWER 1 IS 0", True, True),
        Piece("\n", True, False),
    )


def test_end_of_text_in_a_message_is_text() -> None:
    pieces = ChatTemplate(CHAT_TEMPLATE).pieces([turn("user", END_OF_TEXT), turn("assistant", f"a{END_OF_TEXT}b")])
    assert [piece.text for piece in pieces] == [f"user: {END_OF_TEXT}\nassistant:", f" a{END_OF_TEXT}b"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "a template that only appends"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_fits_no_training_is_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(template).pieces(conversation(1))


text = st.text(st.characters(codec="utf-8"), max_size=20)


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), text), min_size=1, max_size=6))
def test_exactly_the_answers_count_for_any_messages(turns: list[tuple[str, str]]) -> None:
    for template, ends in ((CHAT_TEMPLATE, ""), (CHATML, "<|im_end|>\n")):
        pieces = ChatTemplate(template).pieces([turn(*t) for t in turns])
        lead = " " if template == CHAT_TEMPLATE else ""
        expected = [lead + content + ends for role, content in turns if role == "assistant"]
        assert [piece.text for piece in pieces if piece.counted] == expected
        whole = ChatTemplate(template).render([turn(*t) for t in turns], add_generation_prompt=False)
        assert "".join(piece.text for piece in pieces) == "".join(whole) and pieces[-1].end


# Rows


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "must be a list of messages"),
        ([], "must be a list of messages"),
        (["hello"], "message 0 must be an object with role and content"),
        ([{"role": 1, "content": "a"}], "message 0 must be an object"),
        ([turn("user", None)], "message 0 has no text content"),
        ([turn("user", [{"type": "image_url"}])], "message 0 has no text content"),
        ([turn("user", "a"), {"role": "assistant", "content": "", "tool_calls": [1]}], "message 1 has no text content"),
        ([turn("user", "a")], "no message of the role 'assistant' has content"),
        ([turn("user", "a"), turn("assistant", "")], "no message of the role 'assistant' has content"),
    ],
)
def test_bad_messages_are_refused_with_file_and_line(messages: Any, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "chat.jsonl", [conversation(1), messages])
    with pytest.raises(ValueError, match=f"chat.jsonl:2: 'messages': .*{reason}"):
        prepared(path, tmp_path)


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_messages([turn("assistant", parts)]) == [turn("assistant", "a\nb")]


def test_conversations_given_as_text_are_recognized(tmp_path: Path) -> None:
    path = write(tmp_path / "chat.jsonl", [conversation(1)])
    with pytest.raises(ValueError, match=r"chat.jsonl:1 has no 'text': set data.format=chat to train on conversations"):
        prepared(path, tmp_path, "data.format=text")


def test_text_given_as_conversations_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a text")
    with pytest.raises(ValueError, match="plain text has no conversations"):
        check_source(config(tmp_path / "notes.txt", tmp_path).data)
    with pytest.raises(ValueError, match="data.format='chat' is not allowed: the builtin text has no conversations"):
        config("builtin", tmp_path)
    folder = tmp_path / "both"
    write(folder / "chat.jsonl", [conversation(i) for i in range(9)])
    (folder / "notes.txt").write_text("a text")
    assert skipped(config(folder, tmp_path).data) == ["notes.txt (plain text has no conversations (data.format=chat))"]


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{% for %}", "is not a valid Jinja template"),
        ("{% for a in messages %}" * 25 + "{% endfor %}" * 25, "too many statically nested blocks"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "maximum recursion depth"),
        (None, "cannot be read .No such file"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_a_bad_template_is_refused_at_once(template: Any, error: str, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    if template:
        path.write_bytes(template if isinstance(template, bytes) else template.encode())
    write(tmp_path / "chat.jsonl", [conversation(1)])
    with pytest.raises((ValueError, OSError), match=f"data.chat_template={path}.*{error}"):
        check_source(config(tmp_path / "chat.jsonl", tmp_path, f"data.chat_template={path}").data)
    with pytest.raises(ValueError, match="set it with data.format=chat"):
        config(path, tmp_path, "data.format=text", f"data.chat_template={path}")


def test_all_formats_give_the_same_corpus(tmp_path: Path) -> None:
    rows = [conversation(i, turns=1 + i % 3) for i in range(40)]
    write(tmp_path / "a" / "d.jsonl", rows)
    (tmp_path / "b").mkdir()
    with gzip.open(tmp_path / "b" / "d.jsonl.gz", "wb") as file:
        file.write((tmp_path / "a" / "d.jsonl").read_bytes())
    (tmp_path / "c").mkdir()
    pq.write_table(pa.table({"messages": rows}), tmp_path / "c" / "d.parquet")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "d.jsonl").write_text("".join(json.dumps({"dialog": row}) + "\n" for row in rows))
    found = [prepared(tmp_path / name, tmp_path / "cache") for name in "abc"]
    found.append(prepared(tmp_path / "e", tmp_path / "cache", "data.text_field=dialog"))
    for other in found[1:]:
        for split in ("train", "validation"):
            assert np.array_equal(other.stream(split, "d"), found[0].stream(split, "d"))
            assert np.array_equal(other.counted(split, "d"), found[0].counted(split, "d"))


# Corpora


def answers(corpus: Corpus, split: str, domain: str) -> list[str]:
    """Return the text of each run of counted tokens."""
    tokens, counted = corpus.stream(split, domain), corpus.counted(split, domain)
    assert counted is not None
    edges = np.flatnonzero(np.diff(np.concatenate(([0], counted, [0]))))
    return [
        corpus.tokenizer.decode(tokens[a:b].tolist(), skip_special_tokens=False)
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


def test_the_answers_with_their_ends_are_what_counts(corpus: Corpus) -> None:
    found = [
        a for split in ("train", "validation") for domain in corpus.domains for a in answers(corpus, split, domain)
    ]
    short = [f" THE ANSWER {i} IS 0{END_OF_TEXT}" for i in range(120)]
    long = [f" THE ANSWER {i} IS {t}{END_OF_TEXT}" for i in range(1000, 1060) for t in range(3)]
    assert sorted(found) == sorted([*short, *long])
    assert corpus.chat_template == CHAT_TEMPLATE and corpus.masked


def test_conversations_are_held_out_whole(corpus: Corpus) -> None:
    for domain in corpus.domains:
        whole = corpus.tokenizer.decode(corpus.stream("validation", domain).tolist(), skip_special_tokens=False)
        assert whole.startswith("user: what") and whole.endswith(END_OF_TEXT) and "ANSWER" in whole


def test_the_bytes_are_those_of_the_answers(corpus: Corpus) -> None:
    for split in ("train", "validation"):
        for domain, part in corpus.about["splits"][split].items():
            expected = answers(corpus, split, domain)
            assert part["bytes"] == sum(len(a.removesuffix(END_OF_TEXT).encode()) for a in expected)
            assert part["counted"] == corpus.counted(split, domain).sum()  # type: ignore[union-attr]


def test_windows_pack_conversations_and_count_every_answer_token_once(corpus: Corpus) -> None:
    context = 4 * CONTEXT
    total = corpus.windows(context)
    batch = corpus.batch(seed=1, step=0, global_batch=total, context=context, rows=range(total))
    ends = (batch.tokens == corpus.end_of_text).sum(1)
    assert ends.max() >= 2  # several conversations in a window
    cut = {d: (len(corpus.stream("train", d)) - 1) // context * context for d in corpus.domains}
    expected = sum(corpus.counted("train", d)[1 : cut[d] + 1].sum() for d in corpus.domains)  # type: ignore[index]
    assert batch.mask.sum() == expected
    for tokens, mask in zip(batch.tokens, batch.mask, strict=True):
        for at in np.flatnonzero(tokens[:-1] == corpus.end_of_text):
            assert not mask[at]  # the first token of a conversation is never a target
    held = corpus.validation(context=context)
    assert held.mask.sum() == sum(corpus.counted("validation", d)[1:].sum() for d in corpus.domains)  # type: ignore[index]


def test_the_template_is_part_of_the_fingerprint_and_text_keeps_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "chat.jsonl", [conversation(i) for i in range(60)])
    (tmp_path / "chatml.jinja").write_text(CHATML)
    first, second = (
        prepared(path, tmp_path),
        prepared(path, tmp_path, f"data.chat_template={tmp_path / 'chatml.jinja'}"),
    )
    assert first.fingerprint != second.fingerprint and second.chat_template == CHATML
    assert "<|im_start|>assistant" in second.tokenizer.decode(second.stream("train", "chat").tolist())


def test_an_evaluated_text_counts_the_answers(tmp_path: Path, corpus: Corpus) -> None:
    path = write(tmp_path / "chat.jsonl", [conversation(i) for i in range(5)])
    (found,) = read_text(config(path, tmp_path).data, corpus.tokenizer).values()
    assert found.counted is not None and len(found.counted) == len(found.tokens) > found.counted.sum() > 0
    assert found.bytes == sum(len(f" THE ANSWER {i} IS 0") for i in range(5))
